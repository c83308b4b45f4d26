//! The table of yardsticks in `docs/speed.md` is what the kept results say: `EGMLA_BLESS=1 cargo test --test yardsticks` rewrites it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use serde_json::Value;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/speed.md");
const BEGIN: &str = "<!-- yardsticks: begin -->\n";
const END: &str = "<!-- yardsticks: end -->";

/// A work, our row of it, llama.cpp's ids, that of the CUDA libraries, and what both computed instead, if it is less than the work.
type Line = (&'static str, &'static str, &'static [&'static str], &'static str, &'static str);

/// Ids without a row of ours stand for works that were not measured.
const LINES: [Line; 16] = [
    (
        "MLA decode, 16 heads × (512 + 64), batch 32, 8 192 tokens, f16",
        "decode/mla_dsv3_16h_b32/t8192",
        &["mla_h16_kv8192_b32_f32acc", "mla_h16_kv8192_b32_defprec"],
        "mla/h16_d512+64_b32_t8192",
        "",
    ),
    (
        "the same, batch 1, 4 096 tokens",
        "decode/mla_dsv3_16h/t4096",
        &["mla_h16_kv4096_b1_f32acc", "mla_h16_kv4096_b1_defprec"],
        "mla/h16_d512+64_b1_t4096",
        "",
    ),
    (
        "the same, batch 1, 32 768 tokens",
        "decode/mla_dsv3_16h/t32768",
        &["mla_h16_kv32768_b1_f32acc", "mla_h16_kv32768_b1_defprec"],
        "mla/h16_d512+64_b1_t32768",
        "",
    ),
    (
        "MLA decode, 128 heads × (512 + 64), batch 1, 8 192 tokens, f16",
        "decode/mla_dsv3_128h/t8192",
        &["mla_h128_kv8192_b1_f32acc", "mla_h128_kv8192_b1_defprec"],
        "mla/h128_d512+64_b1_t8192",
        "",
    ),
    (
        "layer, MLA 12 × (256 + 64), 8 192 tokens",
        "decode/mla_120m_r256/t8192",
        &[],
        "mla/h12_d256+64_b1_t8192",
        "attention alone",
    ),
    ("layer, EG-MLA absorbed, table, 1 024 tokens", "decode/egmla_120m_r64/absorbed_table/t1024", &[], "", ""),
    ("the same, 8 192 tokens", "decode/egmla_120m_r64/absorbed_table/t8192", &[], "", ""),
    ("the same, 32 768 tokens", "decode/egmla_120m_r64/absorbed_table/t32768", &[], "", ""),
    (
        "layer, MHA 12 × 64, 8 192 tokens",
        "decode/mha_120m/t8192",
        &["dec_hs64_h12_kv8192_f16_f32acc", "dec_hs64_h12_kv8192_f16_defprec"],
        "mha_decode/h12_d64_kv8192",
        "attention alone",
    ),
    (
        "the same, 32 768 tokens",
        "decode/mha_120m/t32768",
        &["dec_hs64_h12_kv32768_f16_f32acc", "dec_hs64_h12_kv32768_f16_defprec"],
        "mha_decode/h12_d64_kv32768",
        "attention alone",
    ),
    (
        "prefill attention, 16 heads × 128, 512 tokens, f32",
        "prefill/mha_16x128/t512",
        &["pre_hs128_h16_q512_f32_f32acc"],
        "prefill/h16_dk128_dv128_t512_f32",
        "",
    ),
    (
        "the same in f16",
        "prefill/mha_16x128_f16/t512",
        &["pre_hs128_h16_q512_f16_f32acc", "pre_hs128_h16_q512_f16_defprec"],
        "prefill/h16_dk128_dv128_t512_f16",
        "",
    ),
    (
        "the same in f16, 2 048 tokens",
        "prefill/mha_16x128_f16/t2048",
        &["pre_hs128_h16_q2048_f16_f32acc", "pre_hs128_h16_q2048_f16_defprec"],
        "prefill/h16_dk128_dv128_t2048_f16",
        "",
    ),
    (
        "layer, EG-MLA prefill of 2 048 tokens, f16",
        "prefill/egmla_120m/t2048",
        &[],
        "prefill/h12_dk128_dv64_t2048_f16",
        "attention alone",
    ),
    (
        "matrix product 4 096³, f16 with f32 sums",
        "matmul_f16/4096",
        &["mm_f16xf32_4096_defprec", "mm_f16xf16_4096_defprec", "mm_f16xf32_4096_f32acc", "mm_f16xf16_4096_f32acc"],
        "matmul/f16_4096",
        "",
    ),
    (
        "matrix product 1 024³, f32",
        "matmul/1024",
        &["mm_f32xf32_1024_defprec", "mm_f32xf32_1024_f32acc"],
        "matmul/f32_1024",
        "",
    ),
];

fn read(file: &str) -> Value {
    let path = format!("{}/benches/results/{file}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Rows of an id.
fn of<'a>(results: &'a Value, id: &'a str) -> impl Iterator<Item = &'a Value> {
    results["rows"].as_array().unwrap().iter().filter(move |row| row["id"] == id)
}

/// Microseconds: three digits, thousands apart.
fn digits(us: f64) -> String {
    match us {
        0.0..99.95 => format!("{us:.1}"),
        ..1000.0 => us.round().to_string(),
        _ => format!("{} {:03}", us.round() as u64 / 1000, us.round() as u64 % 1000),
    }
}

/// The least of llama.cpp's figures, hot, cold and by its own timestamps: some of its hot ones wait for the host.
fn llama(peers: &Value, ids: &[&str]) -> Option<f64> {
    let figures = |row: &Value| ["hot_us", "cold_us", "gpu_ts_hot_us"].map(|name| row[name].as_f64().unwrap());
    let of_id = |id: &&str| {
        let all: Vec<f64> = of(peers, id).flat_map(figures).collect();
        assert!(!all.is_empty(), "no row {id}");
        all
    };
    ids.iter().flat_map(of_id).min_by(f64::total_cmp)
}

/// The fastest CUDA library, hot or cold, and its name.
fn cuda(peers: &Value, id: &str) -> Option<(f64, &'static str)> {
    let named = of(peers, id).map(|row| (row["median_us"].as_f64().unwrap(), row["impl"].as_str().unwrap()));
    let best = named.min_by(|a, b| a.0.total_cmp(&b.0));
    assert!(id.is_empty() || best.is_some(), "no row {id}");
    let names = [
        ("flashmla", "FlashMLA"),
        ("flashinfer", "FlashInfer"),
        ("sdpa_cudnn", "cuDNN"),
        ("sdpa", "PyTorch SDPA"),
        ("torch_matmul", "cuBLAS"),
        ("torch", "PyTorch"),
        ("sglang", "SGLang"),
    ];
    best.map(|(us, of)| (us, names.iter().find(|(prefix, _)| of.starts_with(prefix)).expect(of).1))
}

fn table() -> String {
    let (ours, peers) = (read("gpu/h200-10d32d5.json"), read("peers-h200.json"));
    let commit = ours["commit"].as_str().unwrap();
    let mut table = format!(
        "| work | egmla at `{commit}` | the same, wgpu's shader checks off | egmla now | llama.cpp, Vulkan | fastest CUDA library |\n\
         |---|--:|--:|---|--:|--:|\n"
    );
    for (work, own, llama_ids, cuda_id, less) in LINES {
        let row = of(&ours, own).next();
        let time = |name: &str| row.and_then(|row| row[name].as_f64()).map_or("–".to_owned(), digits);
        let now = if row.is_some() { "not measured since" } else { "not measured" };
        let less = if less.is_empty() { String::new() } else { format!(", {less}") };
        let none = || if less.is_empty() && cuda_id.is_empty() { "none exists" } else { "–" }.to_owned();
        let llama = llama(&peers, llama_ids).map_or_else(none, |us| format!("{}{less}", digits(us)));
        let cuda = cuda(&peers, cuda_id).map_or_else(none, |(us, name)| format!("{} ({name}{less})", digits(us)));
        let wrong = if row.is_some_and(|row| row["note"].is_string()) { " (wrong)" } else { "" };
        let (us, unchecked) = (time("us"), time("unchecked_us"));
        table += &format!("| {work} | {us}{wrong} | {unchecked} | {now} | {llama} | {cuda} |\n");
    }
    table
}

#[test]
fn the_page_has_the_figures_of_the_results() {
    let (page, table) = (std::fs::read_to_string(PAGE).unwrap(), table());
    let (before, rest) = page.split_once(BEGIN).expect("no block of yardsticks");
    let (found, after) = rest.split_once(END).expect("a block without an end");
    if std::env::var_os("EGMLA_BLESS").is_some() {
        std::fs::write(PAGE, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
    } else {
        assert_eq!(found, table);
    }
}
