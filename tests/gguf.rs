//! GGUF files: what is read of them is what a checkpoint in Hugging Face layout holds, and no bytes make the reader panic, wait
//! or take memory that they do not justify.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;
use std::fs;

use egmla::config::{AttentionConfig, DecoderConfig, GqaConfig, ModelSummary, RopeScaling};
use egmla::decoder::ModelFolder;
use egmla::gguf::{Gguf, List, Value};
use egmla::random::gqa_weights;
use egmla::weights::{AttentionWeights, Checkpoint, GqaWeights};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value as Json, json};

/// A file in the making.
#[derive(Debug, Clone)]
struct File {
    version: u32,
    alignment: u64,
    keys: Vec<(String, Vec<u8>)>,
    tensors: Vec<Tensor>,
}

#[derive(Debug, Clone)]
struct Tensor {
    name: String,
    /// Innermost first.
    extents: Vec<u64>,
    kind: u32,
    bytes: Vec<u8>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A value with its type before it.
fn typed(kind: u32, value: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], value].concat()
}

fn list(kind: u32, values: &[Vec<u8>]) -> Vec<u8> {
    let count = (values.len() as u64).to_le_bytes();
    typed(9, &[&kind.to_le_bytes()[..], &count[..], &values.concat()].concat())
}

impl File {
    fn new(architecture: &str) -> File {
        let file = File { version: 3, alignment: 32, keys: Vec::new(), tensors: Vec::new() };
        file.text("general.architecture", architecture)
    }

    fn key(mut self, key: &str, value: Vec<u8>) -> File {
        self.keys.retain(|(known, _)| known != key);
        self.keys.push((key.to_owned(), value));
        self
    }

    fn text(self, key: &str, value: &str) -> File {
        self.key(key, typed(8, &text(value)))
    }

    fn u32(self, key: &str, value: u32) -> File {
        self.key(key, typed(4, &value.to_le_bytes()))
    }

    fn f32(self, key: &str, value: f32) -> File {
        self.key(key, typed(6, &value.to_le_bytes()))
    }

    fn bool(self, key: &str, value: bool) -> File {
        self.key(key, typed(7, &[value.into()]))
    }

    fn texts(self, key: &str, values: &[String]) -> File {
        self.key(key, list(8, &values.iter().map(|value| text(value)).collect::<Vec<_>>()))
    }

    fn tensor(mut self, name: &str, extents: &[u64], kind: u32, bytes: Vec<u8>) -> File {
        self.tensors.push(Tensor { name: name.to_owned(), extents: extents.to_vec(), kind, bytes });
        self
    }

    /// A tensor in f32 whose extents are given outermost first.
    fn floats(self, name: &str, shape: &[usize], values: &[f32]) -> File {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        let extents: Vec<_> = shape.iter().rev().map(|&extent| extent as u64).collect();
        self.tensor(name, &extents, 0, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            bytes.extend(text(key));
            bytes.extend(value);
        }
        let mut data: Vec<u8> = Vec::new();
        for tensor in &self.tensors {
            data.resize(data.len().next_multiple_of(self.alignment as usize), 0);
            bytes.extend(text(&tensor.name));
            bytes.extend((tensor.extents.len() as u32).to_le_bytes());
            tensor.extents.iter().for_each(|extent| bytes.extend(extent.to_le_bytes()));
            bytes.extend(tensor.kind.to_le_bytes());
            bytes.extend((data.len() as u64).to_le_bytes());
            data.extend(&tensor.bytes);
        }
        bytes.resize(bytes.len().next_multiple_of(self.alignment as usize), 0);
        bytes.extend(data);
        bytes
    }

    fn read(&self) -> Gguf {
        Gguf::from_bytes(self.bytes()).unwrap()
    }

    #[track_caller]
    fn refused(&self, part: &str) {
        refused(self.bytes(), part);
    }
}

#[track_caller]
fn refused(bytes: Vec<u8>, part: &str) {
    let error = Gguf::from_bytes(bytes).unwrap_err().to_string();
    assert!(error.contains(part) && !error.contains('\n'), "`{part}` is not in `{error}`");
}

/// Numbers that differ, and whose order shows.
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..count).map(|_| random.f32() - 0.5).collect()
}

#[test]
fn every_type_of_the_metadata_is_read() {
    for version in [2, 3] {
        let mut file = File::new("llama")
            .key("u8", typed(0, &[200]))
            .key("i8", typed(1, &[200]))
            .key("u16", typed(2, &60000u16.to_le_bytes()))
            .key("i16", typed(3, &(-2i16).to_le_bytes()))
            .u32("u32", u32::MAX)
            .key("i32", typed(5, &i32::MIN.to_le_bytes()))
            .f32("f32", 1e-5)
            .bool("yes", true)
            .key("u64", typed(10, &u64::MAX.to_le_bytes()))
            .key("i64", typed(11, &i64::MIN.to_le_bytes()))
            .key("f64", typed(12, &0.1f64.to_le_bytes()))
            .texts("texts", &["a".to_owned(), String::new(), "é".to_owned()])
            .key("bools", list(7, &[vec![1], vec![0]]))
            .key("i8s", list(1, &[vec![255], vec![1]]))
            .key("empty", list(4, &[]))
            .key("nested", list(9, &[list(5, &[vec![1, 0, 0, 0]])[4..].to_vec(), list(8, &[text("b")])[4..].to_vec()]));
        file.version = version;
        let read = file.read();
        let at = |key: &str| read.metadata()[key].clone();
        assert_eq!(at("u8"), Value::Unsigned(200));
        assert_eq!(at("i8"), Value::Signed(-56));
        assert_eq!(at("u16"), Value::Unsigned(60000));
        assert_eq!(at("i16"), Value::Signed(-2));
        assert_eq!(at("u32"), Value::Unsigned(u32::MAX.into()));
        assert_eq!(at("i32"), Value::Signed(i32::MIN.into()));
        assert_eq!(at("f32"), Value::Number(1e-5), "as it was written, not what f32 makes of it");
        assert_eq!(at("yes"), Value::Bool(true));
        assert_eq!(at("u64"), Value::Unsigned(u64::MAX));
        assert_eq!(at("i64"), Value::Signed(i64::MIN));
        assert_eq!(at("f64"), Value::Number(0.1));
        assert_eq!(at("texts"), Value::List(List::Texts(vec!["a".into(), String::new(), "é".into()])));
        assert_eq!(at("bools"), Value::List(List::Bools(vec![true, false])));
        assert_eq!(at("i8s"), Value::List(List::Signed(vec![-1, 1])));
        assert_eq!(at("empty"), Value::List(List::Unsigned(vec![])));
        let nested = vec![List::Signed(vec![1]), List::Texts(vec!["b".into()])];
        assert_eq!(at("nested"), Value::List(List::Lists(nested)));
        assert_eq!(read.metadata().len(), 17);
    }
}

#[test]
fn a_tensor_is_read_from_its_own_bytes() {
    // More than is read at once, and not a multiple of it.
    let many = values(300_001, 1);
    for alignment in [1, 32, 64] {
        let mut file = File::new("llama")
            .u32("general.alignment", alignment)
            .floats("a", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
            .floats("many", &[many.len()], &many)
            .tensor("h", &[3], 1, vec![0, 0x3c, 0, 0xc0, 0, 0x38])
            .tensor("b", &[2], 30, vec![0x80, 0x3f, 0x80, 0xbf])
            .tensor("i", &[1, 1, 1, 2], 26, vec![0; 8])
            .tensor("later", &[7], 77, vec![0; 4]);
        file.alignment = alignment.into();
        let read = file.read();
        assert_eq!(read.tensors()["a"].shape, [2, 3]);
        assert_eq!(read.tensors()["a"].dtype, "F32");
        assert_eq!(read.tensors()["i"].shape, [2, 1, 1, 1]);
        assert_eq!(read.read("a").unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(read.read("many").unwrap(), many);
        assert_eq!(read.read("h").unwrap(), [1.0, -2.0, 0.5]);
        assert_eq!(read.read("b").unwrap(), [1.0, -1.0]);
        let problem = |name: &str| read.read(name).unwrap_err().to_string();
        assert!(problem("i").starts_with("tensor `i` has element type I32, expected F32, F16"), "{}", problem("i"));
        assert!(problem("later").starts_with("tensor `later` has element type number 77, expected F32"));
        assert!(problem("none").starts_with("tensor `none` is missing"));
    }
}

#[test]
fn a_file_that_ends_early_is_refused_wherever_it_ends() {
    let file = File::new("llama")
        .u32("general.alignment", 32)
        .texts("texts", &["a".to_owned(), "bc".to_owned()])
        .bool("yes", true)
        .key("nested", list(9, &[list(5, &[vec![1, 0, 0, 0]])[4..].to_vec()]))
        .floats("a", &[2, 3], &values(6, 1))
        .tensor("q", &[32], 8, vec![1; 34]);
    let bytes = file.bytes();
    Gguf::from_bytes(bytes.clone()).unwrap();
    for length in 0..bytes.len() {
        let error = Gguf::from_bytes(bytes[..length].to_vec()).unwrap_err().to_string();
        assert!(error.starts_with("not a valid GGUF file: "), "{length}: {error}");
        assert!(error.contains(&format!("file of {length}")), "{length}: {error}");
    }
    // A single byte that differs: an error or another content, never a panic.
    for at in 0..bytes.len() {
        for flip in [1, 0x80, 0xff] {
            let mut changed = bytes.clone();
            changed[at] ^= flip;
            if let Ok(read) = Gguf::from_bytes(changed) {
                for (name, info) in read.tensors() {
                    if let Ok(values) = read.read(name) {
                        assert_eq!(values.len(), info.shape.iter().product::<usize>(), "{at}");
                    }
                }
            }
        }
    }
}

#[test]
fn what_a_header_says_is_checked() {
    refused(b"GGML\x03\0\0\0".to_vec(), r#"it begins with "GGML", not GGUF"#);
    refused(b"GGUF\0\0\0\x03".to_vec(), "it is big-endian");
    refused(b"GGUF\x01\0\0\0".to_vec(), "version 1, only 2 and 3 are read");
    let counts = |tensors: u64, keys: u64| {
        [&b"GGUF\x03\0\0\0"[..], &tensors.to_le_bytes(), &keys.to_le_bytes(), &[0; 64]].concat()
    };
    for count in [3, 1 << 40, u64::MAX] {
        refused(counts(count, 0), &format!("{count} tensors at byte 24 do not fit a file of 88 bytes"));
        let keys = count.max(5);
        refused(counts(0, keys), &format!("{keys} keys at byte 24 do not fit a file of 88 bytes"));
    }
    let of = || File::new("llama");
    let twice = File { keys: vec![("a".into(), typed(7, &[1])), ("a".into(), typed(7, &[1]))], ..of() };
    twice.refused("key `a` is given twice");
    of().key("a", typed(13, &[])).refused("key `a` has type 13, which is not known");
    of().key("a", typed(7, &[2])).refused("key `a` is 2, not 0 or 1");
    of().key("a", typed(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff])).refused("a at byte 90 is not UTF-8");
    for length in [100, u64::MAX] {
        of().key("a", typed(8, &length.to_le_bytes())).refused(&format!("{length} bytes of a at byte"));
        let list_of = |kind: u32| typed(9, &[&kind.to_le_bytes()[..], &length.to_le_bytes()].concat());
        for kind in [0, 3, 6, 7, 8, 9, 12] {
            of().key("a", list_of(kind)).refused(&format!("{length} values of `a` at byte"));
        }
        of().key("a", list_of(13)).refused("key `a` is a list of type 13, which is not known");
    }
    let many = (1u64 << 22) + 1;
    let values = typed(9, &[&0u32.to_le_bytes()[..], &many.to_le_bytes(), &vec![0; many as usize]].concat());
    of().key("a", values).refused("key `a` has 4194305 values, at most 4194304 are read");
    let keys = (0..65537).map(|key| (key.to_string(), typed(7, &[1]))).collect();
    File { keys, ..of() }.refused("0 tensors and 65537 keys, at most 65536 of each are read");
    // Lists within lists, each of one more.
    let nested = (0..1000).fold(list(0, &[]), |inner, _| list(9, &[inner[4..].to_vec()]));
    of().key("a", nested).refused("key `a` has lists within lists more than 4 deep");
    for alignment in [0, 3, 1 << 21] {
        of().u32("general.alignment", alignment).refused("not a power of two up to 1048576");
    }
    of().text("general.alignment", "32").refused("general.alignment is Text(\"32\"), not a power of two");
}

#[test]
fn places_of_tensors_are_checked() {
    let of = |extents: &[u64], kind: u32| File::new("llama").tensor("a", extents, kind, vec![0; 64]);
    of(&[], 0).refused("tensor `a` has 0 extents, must have 1 to 4");
    of(&[1; 5], 0).refused("tensor `a` has 5 extents, must have 1 to 4");
    of(&[4, 0], 0).refused("tensor `a` has extents [4, 0], the innermost first: 0, or too many elements");
    of(&[1 << 32, 1 << 32], 0).refused("too many elements");
    of(&[1 << 62], 0).refused("too many elements");
    of(&[1 << 60], 28).refused("tensor `a` has 9223372036854775808 bytes from byte 0");
    of(&[16, 2], 2).refused("tensor `a` has rows of 16, not a multiple of 32, a block of Q4_0");
    of(&[17], 0)
        .refused("tensor `a` has 68 bytes from byte 0 of the tensors, which begin at byte 128 of a file of 192");
    // Changes the offset of the last tensor.
    let moved = |file: &File, offset: u64| {
        let mut bytes = file.bytes();
        let name = text(&file.tensors.last().unwrap().name);
        let at = bytes.windows(name.len()).rposition(|window| window == name).unwrap() + name.len() + 4 + 8 + 4;
        bytes[at..at + 8].copy_from_slice(&offset.to_le_bytes());
        bytes
    };
    let two = of(&[16], 0).tensor("b", &[16], 0, vec![0; 64]);
    Gguf::from_bytes(moved(&two, 64)).unwrap();
    refused(moved(&two, 32), "tensors `a` and `b` share bytes");
    refused(moved(&two, 0), "share bytes");
    refused(moved(&two, 65), "tensor `b` begins at byte 65, not a multiple of 32, the alignment");
    refused(moved(&two, 96), "tensor `b` has 64 bytes from byte 96");
    refused(moved(&two, u64::MAX - 31), "tensor `b` has 64 bytes from byte 18446744073709551584");
    let twice = of(&[16], 0).tensor("a", &[16], 0, vec![0; 64]);
    twice.refused("tensor `a` is given twice");
}

/// A tiny `llama` with grouped queries.
const LLAMA: &str = r#"{"model_type":"llama","hidden_size":8,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":6,
    "num_hidden_layers":2,"intermediate_size":12,"vocab_size":262,"max_position_embeddings":64,"rms_norm_eps":1e-5,
    "rope_theta":100000.0,"tie_word_embeddings":false,"hidden_act":"silu","attention_bias":false}"#;

/// The metadata of that model.
fn llama() -> File {
    File::new("llama")
        .u32("llama.block_count", 2)
        .u32("llama.context_length", 64)
        .u32("llama.embedding_length", 8)
        .u32("llama.feed_forward_length", 12)
        .u32("llama.attention.head_count", 4)
        .u32("llama.attention.head_count_kv", 2)
        .u32("llama.attention.key_length", 6)
        .u32("llama.attention.value_length", 6)
        .u32("llama.rope.dimension_count", 6)
        .f32("llama.rope.freq_base", 100000.0)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .u32("llama.vocab_size", 262)
}

/// Names of that model in a checkpoint and in a file, its shape, and heads whose rows a file has in another order.
fn tensors_of_llama() -> Vec<(String, String, Vec<usize>, Option<usize>)> {
    let mut all = vec![
        ("model.embed_tokens".to_owned(), "token_embd".to_owned(), vec![262, 8], None),
        ("model.norm".to_owned(), "output_norm".to_owned(), vec![8], None),
        ("lm_head".to_owned(), "output".to_owned(), vec![262, 8], None),
    ];
    for layer in 0..2 {
        for (name, own, shape, heads) in [
            ("input_layernorm", "attn_norm", vec![8], None),
            ("self_attn.q_proj", "attn_q", vec![24, 8], Some(4)),
            ("self_attn.k_proj", "attn_k", vec![12, 8], Some(2)),
            ("self_attn.v_proj", "attn_v", vec![12, 8], None),
            ("self_attn.o_proj", "attn_output", vec![8, 24], None),
            ("post_attention_layernorm", "ffn_norm", vec![8], None),
            ("mlp.gate_proj", "ffn_gate", vec![12, 8], None),
            ("mlp.up_proj", "ffn_up", vec![12, 8], None),
            ("mlp.down_proj", "ffn_down", vec![8, 12], None),
        ] {
            all.push((format!("model.layers.{layer}.{name}"), format!("blk.{layer}.{own}"), shape, heads));
        }
    }
    all
}

/// Rows as a `llama` file has them: row 2i + s of a head is the checkpoint's s · d/2 + i.
fn turned(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (d, width) = (rows / heads, values.len() / rows);
    let row = |row: usize| {
        let (head, inner) = (row / d, row % d);
        let from = head * d + inner % 2 * (d / 2) + inner / 2;
        values[from * width..(from + 1) * width].to_vec()
    };
    (0..rows).flat_map(row).collect()
}

/// The characters of a byte-level vocabulary, in the order of their bytes.
fn byte_tokens() -> Vec<String> {
    let printed = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut others = 0..;
    let character = |byte: u32| match printed(byte) {
        true => byte,
        false => 0x100 + others.next().unwrap(),
    };
    (0..256).map(character).map(|code| char::from_u32(code).unwrap().to_string()).collect()
}

/// A vocabulary of bytes, four merges and two special tokens; in a file.
fn with_tokenizer(file: File) -> File {
    let tokens = [byte_tokens(), ["ab", "12", "123", "1234", "<|end|>", "<tag>"].map(str::to_owned).to_vec()].concat();
    let types = (0..262).map(|id| i32::to_le_bytes([1, 3, 4][(id >= 260) as usize + (id >= 261) as usize]).to_vec());
    file.text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "smollm")
        .texts("tokenizer.ggml.tokens", &tokens)
        .key("tokenizer.ggml.token_type", list(5, &types.collect::<Vec<_>>()))
        .texts("tokenizer.ggml.merges", &["a b", "1 2", "12 3", "123 4"].map(str::to_owned))
        .u32("tokenizer.ggml.bos_token_id", 260)
        .u32("tokenizer.ggml.eos_token_id", 260)
        .text("tokenizer.chat_template", "{{ messages }}")
}

/// The `tokenizer.json` of the same, written by hand.
fn tokenizer_json() -> Json {
    let mut vocab: BTreeMap<_, _> = byte_tokens().into_iter().enumerate().map(|(id, token)| (token, id)).collect();
    vocab.extend([("ab", 256), ("12", 257), ("123", 258), ("1234", 259)].map(|(token, id)| (token.to_owned(), id)));
    let added = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "special": special, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false})
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let digits = json!({"type": "Digits", "individual_digits": true});
    json!({
        "version": "1.0", "added_tokens": [added(260, "<|end|>", true), added(261, "<tag>", false)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, bytes]}, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b", "1 2", "12 3", "123 4"]},
    })
}

const TEXT: &str = "To be, or not: don't 12345 caf\u{e9} \u{65e5}\u{672c}\u{8a9e}  \n\n\tab<|end|>abab<tag> \u{1f600} ";

#[test]
fn a_whole_model_is_the_same_from_a_file_and_from_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mut file = with_tokenizer(llama());
    let mut views = BTreeMap::new();
    let mut data = Vec::new();
    for (seed, (name, own, shape, heads)) in tensors_of_llama().into_iter().enumerate() {
        let values = values(shape.iter().product(), seed as u64);
        let in_file = heads.map_or_else(|| values.clone(), |heads| turned(&values, shape[0], heads));
        assert_eq!(in_file == values, heads.is_none(), "the test moves rows");
        file = file.floats(&format!("{own}.weight"), &shape, &in_file);
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        data.push((format!("{name}.weight"), shape, bytes));
    }
    for (name, shape, bytes) in &data {
        views.insert(name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap());
    }
    fs::write(folder.path().join("model.safetensors"), safetensors::serialize(&views, None).unwrap()).unwrap();
    fs::write(folder.path().join("config.json"), LLAMA).unwrap();
    fs::write(folder.path().join("tokenizer.json"), tokenizer_json().to_string()).unwrap();
    let path = folder.path().join("m.gguf");
    fs::write(&path, file.bytes()).unwrap();
    // A name does not make the format.
    let unnamed = folder.path().join("blob");
    fs::write(&unnamed, file.bytes()).unwrap();

    let by_folder = ModelFolder::open(folder.path()).unwrap();
    for path in [path, unnamed] {
        let by_file = ModelFolder::open(&path).unwrap();
        assert_eq!(by_file.config(), by_folder.config());
        assert_eq!(by_file.weights().unwrap(), by_folder.weights().unwrap());
        let ids = by_file.encode(TEXT).unwrap();
        assert_eq!(ids, by_folder.encode(TEXT).unwrap());
        for ids in [&ids[..], &[260, 261, 256]] {
            assert_eq!(by_file.tokenizer().decode(ids).unwrap(), by_folder.tokenizer().decode(ids).unwrap());
        }
    }

    // Another file in the place of one whose header was read.
    let path = folder.path().join("m.gguf");
    let open = Gguf::open(&path).unwrap();
    open.read("output_norm.weight").unwrap();
    fs::write(&path, [&file.bytes()[..], &[0]].concat()).unwrap();
    let changed = open.read("output_norm.weight").unwrap_err().to_string();
    assert_eq!(changed, "it has changed since its header was read");

    // What has no place in the model, and what is missing.
    let weights = |file: &File| {
        fs::write(folder.path().join("m.gguf"), file.bytes()).unwrap();
        ModelFolder::open(&folder.path().join("m.gguf")).unwrap().weights().unwrap_err().to_string()
    };
    let extra = weights(&file.clone().floats("blk.0.attn_sinks.weight", &[4], &values(4, 1)));
    assert!(extra.contains("m.gguf: tensor `blk.0.attn_sinks.weight` of shape [4] is not expected"), "{extra}");
    let mut less = file.clone();
    less.tensors.retain(|tensor| tensor.name != "blk.1.ffn_up.weight");
    let missing = weights(&less);
    assert!(missing.contains("tensor `model.layers.1.mlp.up_proj.weight` is missing"), "{missing}");
    let mut part = file.clone().key("split.count", typed(2, &[3, 0])).key("split.no", typed(2, &[1, 0]));
    fs::write(folder.path().join("m.gguf"), part.bytes()).unwrap();
    let problem = ModelFolder::open(&folder.path().join("m.gguf")).unwrap_err().to_string();
    let expected =
        "a part of a file, number 2 of 3, is not supported: join the parts first, with `llama-gguf-split --merge`";
    assert!(problem.ends_with(expected), "{problem}");
    part = part.key("split.count", typed(2, &[1, 0]));
    fs::write(folder.path().join("m.gguf"), part.bytes()).unwrap();
    ModelFolder::open(&folder.path().join("m.gguf")).unwrap();
}

/// Scores of rotated queries and keys are what the order of a file's rows is for: pairs of neighbours there, halves here.
#[test]
fn rows_of_queries_are_where_rotation_by_halves_expects_them() {
    let (d, position) = (6, 5.0f64);
    let angle = |pair: usize| position * 100000f64.powf(-2.0 * pair as f64 / d as f64);
    let rotate = |row: &[f32], pair: &dyn Fn(usize) -> (usize, usize)| {
        let mut out = vec![0.0; d];
        for i in 0..d / 2 {
            let ((a, b), (sin, cos)) = (pair(i), angle(i).sin_cos());
            let (x, y) = (f64::from(row[a]), f64::from(row[b]));
            (out[a], out[b]) = (x * cos - y * sin, x * sin + y * cos);
        }
        out
    };
    // One head of one input: the columns of a projection are the rows themselves.
    let file = llama().floats("blk.0.attn_q.weight", &[24, 1], &values(24, 1)).floats(
        "blk.0.attn_k.weight",
        &[12, 1],
        &values(12, 2),
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    fs::write(&path, file.bytes()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let queries = checkpoint.take("model.layers.0.self_attn.q_proj.weight", &[24, 1]).unwrap().data;
    let keys = checkpoint.take("model.layers.0.self_attn.k_proj.weight", &[12, 1]).unwrap().data;
    let gguf = file.read();
    let (file_queries, file_keys) =
        (gguf.read("blk.0.attn_q.weight").unwrap(), gguf.read("blk.0.attn_k.weight").unwrap());
    let score = |queries: &[f32], keys: &[f32], pair: &dyn Fn(usize) -> (usize, usize)| {
        let turned = rotate(queries, pair);
        turned.iter().zip(keys).map(|(q, &k)| q * f64::from(k)).sum::<f64>()
    };
    for head in 0..4 {
        let (q, k) = (head * d..(head + 1) * d, head / 2 * d..(head / 2 + 1) * d);
        let halves = score(&queries[q.clone()], &keys[k.clone()], &|i| (i, i + d / 2));
        let neighbours = score(&file_queries[q], &file_keys[k], &|i| (2 * i, 2 * i + 1));
        assert!((halves - neighbours).abs() < 1e-12, "{halves}, {neighbours}");
    }
}

/// A `deepseek2` of low-rank queries, scaled by YaRN.
const DEEPSEEK: &str = r#"{"model_type":"deepseek_v2","hidden_size":8,"num_attention_heads":3,"kv_lora_rank":5,"q_lora_rank":7,
    "qk_nope_head_dim":4,"qk_rope_head_dim":6,"v_head_dim":3,"num_hidden_layers":2,"intermediate_size":9,"vocab_size":262,
    "max_position_embeddings":640,"rms_norm_eps":1e-6,"rope_theta":10000,"tie_word_embeddings":true,
    "rope_scaling":{"type":"yarn","factor":40,"original_max_position_embeddings":16,"beta_fast":32,"beta_slow":1,
    "mscale":0.707,"mscale_all_dim":0.707}}"#;

fn deepseek() -> File {
    File::new("deepseek2")
        .u32("deepseek2.block_count", 2)
        .u32("deepseek2.context_length", 640)
        .u32("deepseek2.embedding_length", 8)
        .u32("deepseek2.feed_forward_length", 9)
        .u32("deepseek2.attention.head_count", 3)
        .u32("deepseek2.attention.head_count_kv", 1)
        .u32("deepseek2.attention.key_length", 11)
        .u32("deepseek2.attention.value_length", 5)
        .u32("deepseek2.attention.key_length_mla", 10)
        .u32("deepseek2.attention.value_length_mla", 3)
        .u32("deepseek2.attention.kv_lora_rank", 5)
        .u32("deepseek2.attention.q_lora_rank", 7)
        .u32("deepseek2.rope.dimension_count", 6)
        .f32("deepseek2.rope.freq_base", 10000.0)
        .text("deepseek2.rope.scaling.type", "yarn")
        .f32("deepseek2.rope.scaling.factor", 40.0)
        .u32("deepseek2.rope.scaling.original_context_length", 16)
        .f32("deepseek2.rope.scaling.yarn_beta_fast", 32.0)
        .f32("deepseek2.rope.scaling.yarn_beta_slow", 1.0)
        .f32("deepseek2.rope.scaling.yarn_log_multiplier", 0.0707)
        .f32("deepseek2.attention.layer_norm_rms_epsilon", 1e-6)
        .u32("deepseek2.leading_dense_block_count", 2)
        .u32("deepseek2.expert_feed_forward_length", 9)
        .u32("deepseek2.expert_shared_count", 0)
        .u32("deepseek2.vocab_size", 262)
}

/// Its tensors of attention, with `kv_b_proj` as each generation of files has it.
fn deepseek_attention(mut file: File, weights: &AttentionWeights, whole: bool, parts: bool) -> File {
    let egmla::weights::QueryWeights::LowRank { a_proj, a_norm, b_proj, .. } = &weights.query else { panic!() };
    let kv_b = &weights.kv_b_proj;
    for (own, tensor) in [
        ("attn_q_a", a_proj),
        ("attn_q_a_norm", a_norm),
        ("attn_q_b", b_proj),
        ("attn_kv_a_mqa", &weights.kv_a_proj),
        ("attn_kv_a_norm", weights.kv_a_norm.as_ref().unwrap()),
        ("attn_output", &weights.o_proj),
    ] {
        file = file.floats(&format!("blk.1.{own}.weight"), &tensor.shape, &tensor.data);
    }
    if whole {
        file = file.floats("blk.1.attn_kv_b.weight", &kv_b.shape, &kv_b.data);
    }
    if parts {
        let at = |head: usize, row: usize, column: usize| kv_b.data[(head * 7 + row) * 5 + column];
        let mut keys = Vec::new();
        let mut values = Vec::new();
        for head in 0..3 {
            (0..5).for_each(|column| keys.extend((0..4).map(|row| at(head, row, column))));
            (4..7).for_each(|row| values.extend((0..5).map(|column| at(head, row, column))));
        }
        file = file.floats("blk.1.attn_k_b.weight", &[3, 5, 4], &keys).floats(
            "blk.1.attn_v_b.weight",
            &[3, 3, 5],
            &values,
        );
    }
    file
}

#[test]
fn latent_attention_is_the_same_from_every_generation_of_files() {
    let expected = AttentionConfig::from_json(DEEPSEEK).unwrap();
    let weights = egmla::random::attention_weights(&expected, true, 3).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    // Before the parts there were no widths of them.
    let mut old = deepseek();
    old.keys.retain(|(key, _)| !key.ends_with("_mla"));
    let old = old.u32("deepseek2.attention.key_length", 10).u32("deepseek2.attention.value_length", 3);
    for (file, whole, parts) in [(old, true, false), (deepseek(), true, true), (deepseek(), false, true)] {
        let file = deepseek_attention(file, &weights, whole, parts);
        let text = file.read().config_json().unwrap();
        assert_eq!(AttentionConfig::from_json(&text).unwrap(), expected);
        assert_eq!(DecoderConfig::from_json(&text).unwrap(), DecoderConfig::from_json(DEEPSEEK).unwrap());
        fs::write(&path, file.bytes()).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let read = AttentionWeights::load(&checkpoint, "model.layers.1.self_attn.", &expected).unwrap();
        assert_eq!(read.kv_b_proj.data, weights.kv_b_proj.data);
        let QueryRead { q_b, kv_a } = QueryRead::of(&read);
        assert_eq!((q_b, kv_a), {
            let QueryRead { q_b, kv_a } = QueryRead::of(&weights);
            (q_b, kv_a)
        });
        assert_eq!(
            (read.o_proj.data, read.kv_a_norm.unwrap().data),
            (weights.o_proj.data.clone(), weights.kv_a_norm.clone().unwrap().data)
        );
    }
    let open = |file: File| {
        fs::write(&path, file.bytes()).unwrap();
        Checkpoint::open(&path).map(drop).unwrap_err().to_string()
    };
    let keys = |shape: &[usize]| deepseek().floats("blk.0.attn_k_b.weight", shape, &values(shape.iter().product(), 1));
    assert!(open(keys(&[3, 5, 4])).ends_with("tensor `blk.0.attn_v_b.weight` is missing (expected shape [])"));
    let other = open(keys(&[3, 5, 4]).floats("blk.0.attn_v_b.weight", &[3, 3, 4], &values(36, 1)));
    assert!(other.contains("has shape [3, 5, 4] and its `attn_v_b` [3, 3, 4]"), "{other}");
    let flat = open(keys(&[15, 4]).floats("blk.0.attn_v_b.weight", &[9, 5], &values(45, 1)));
    assert!(flat.contains("they are not [heads, d_latent, d_nope]"), "{flat}");
}

/// The matrices that a wrong order of rows would show in.
struct QueryRead<'a> {
    q_b: &'a [f32],
    kv_a: &'a [f32],
}

impl<'a> QueryRead<'a> {
    fn of(weights: &'a AttentionWeights) -> Self {
        let egmla::weights::QueryWeights::LowRank { b_proj, .. } = &weights.query else { panic!() };
        QueryRead { q_b: &b_proj.data, kv_a: &weights.kv_a_proj.data }
    }
}

#[test]
fn a_configuration_is_what_a_checkpoint_of_the_model_says() {
    let read = |file: &File| DecoderConfig::from_json(&file.read().config_json().unwrap());
    let output = |file: File| file.floats("output.weight", &[1], &[1.0]);
    assert_eq!(read(&output(llama())).unwrap(), DecoderConfig::from_json(LLAMA).unwrap());
    assert!(read(&llama()).unwrap().tie_word_embeddings);
    // Without the widths, and with a number for every layer.
    let mut plain = llama();
    plain.keys.retain(|(key, _)| !key.contains("_length") || key.contains("context") || key.contains("d_"));
    let plain = output(plain.u32("llama.embedding_length", 24).u32("llama.rope.dimension_count", 6));
    assert_eq!(read(&plain).unwrap().attention, {
        let text = LLAMA.replace(r#""hidden_size":8"#, r#""hidden_size":24"#).replace(r#""head_dim":6,"#, "");
        DecoderConfig::from_json(&text).unwrap().attention
    });
    let each = |value: u32| list(4, &[value.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()]);
    let listed = output(llama()).key("llama.attention.head_count", each(4)).key("llama.feed_forward_length", each(12));
    assert_eq!(read(&listed).unwrap(), DecoderConfig::from_json(LLAMA).unwrap());
    let differing = llama().key("llama.attention.head_count", list(4, &[vec![4, 0, 0, 0], vec![2, 0, 0, 0]]));
    let problem = |file: &File| file.read().config_json().unwrap_err().to_string();
    assert!(problem(&differing).contains("llama.attention.head_count`: differs from layer to layer"));

    // Refused by name, whole or in part.
    let refused = |file: File| read(&file).unwrap_err().to_string();
    assert!(refused(llama().u32("llama.attention.sliding_window", 16)).contains("sliding_window"));
    assert!(refused(llama().u32("llama.rope.dimension_count", 4)).contains("partial_rotary_factor"));
    assert!(refused(llama().f32("llama.logit_scale", 2.0)).contains("llama.logit_scale"));
    assert!(refused(llama().floats("blk.0.ffn_up.bias", &[1], &[1.0])).contains("mlp_bias"));
    let biased = llama().floats("blk.0.attn_q.bias", &[24], &values(24, 1));
    assert!(GqaConfig::from_json(&biased.read().config_json().unwrap()).unwrap().qkv_bias);
    let experts = llama().u32("llama.expert_count", 8).u32("llama.expert_used_count", 2);
    assert!(refused(experts.clone()).contains("num_local_experts"));
    let text = experts.read().config_json().unwrap();
    GqaConfig::from_json(&text).unwrap();
    let summary = ModelSummary::from_json(&text).unwrap();
    assert!(summary.attention_problem.is_none() || summary.decoder_problem.is_some(), "{summary:?}");
    let experts = deepseek().u32("deepseek2.expert_count", 64).u32("deepseek2.leading_dense_block_count", 1);
    assert!(refused(experts.clone()).contains("n_routed_experts"));
    AttentionConfig::from_json(&experts.read().config_json().unwrap()).unwrap();
    let sigmoid = deepseek().u32("deepseek2.expert_gating_func", 2).u32("deepseek2.nextn_predict_layers", 1);
    let summary = ModelSummary::from_json(&sigmoid.read().config_json().unwrap()).unwrap();
    assert_eq!((summary.model_type.as_deref(), summary.n_layer), (Some("deepseek_v3"), 1));
    let tempered = deepseek().f32("deepseek2.attention.temperature_scale", 0.1);
    let text = tempered.read().config_json().unwrap();
    assert!(
        AttentionConfig::from_json(&text).unwrap_err().to_string().contains("deepseek2.attention.temperature_scale")
    );
    let qwen = File::new("qwen2")
        .u32("qwen2.block_count", 1)
        .u32("qwen2.embedding_length", 8)
        .u32("qwen2.attention.head_count", 4)
        .u32("qwen2.attention.head_count_kv", 2)
        .f32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
        .floats("blk.0.attn_q.bias", &[8], &values(8, 1));
    let qwen = GqaConfig::from_json(&qwen.read().config_json().unwrap()).unwrap();
    assert!((qwen.qkv_bias, qwen.o_bias, qwen.rope.interleave) == (true, false, false));
    let qwen = File::new("qwen3")
        .u32("qwen3.block_count", 1)
        .u32("qwen3.embedding_length", 8)
        .u32("qwen3.attention.head_count", 4)
        .u32("qwen3.attention.head_count_kv", 2)
        .u32("qwen3.attention.key_length", 6)
        .u32("qwen3.attention.value_length", 6)
        .f32("qwen3.attention.layer_norm_rms_epsilon", 1e-6);
    let config = GqaConfig::from_json(&qwen.read().config_json().unwrap()).unwrap();
    assert_eq!((config.head_dim, config.qkv_bias, config.qk_norm_eps), (6, false, Some(1e-6)));
    // No row is moved, and the norms have their names.
    let weights = gqa_weights(&config, 3).unwrap();
    let mut file = qwen;
    for (name, tensor) in [
        ("attn_q", &weights.q_proj),
        ("attn_k", &weights.k_proj),
        ("attn_v", &weights.v_proj),
        ("attn_output", &weights.o_proj),
        ("attn_q_norm", weights.q_norm.as_ref().unwrap()),
        ("attn_k_norm", weights.k_norm.as_ref().unwrap()),
    ] {
        file = file.floats(&format!("blk.0.{name}.weight"), &tensor.shape, &tensor.data);
    }
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("m.gguf"), file.bytes()).unwrap();
    let checkpoint = Checkpoint::open(&folder.path().join("m.gguf")).unwrap();
    let found = GqaWeights::load(&checkpoint, "model.layers.0.self_attn.", &config).unwrap();
    assert_eq!((found.q_proj.data, found.k_proj.data), (weights.q_proj.data, weights.k_proj.data));
    assert_eq!(found.q_norm.unwrap().data, weights.q_norm.unwrap().data);
    assert_eq!(found.k_norm.unwrap().data, weights.k_norm.unwrap().data);

    for (file, part) in [
        (File::new("gemma"), "`gemma` is not read, only llama, qwen2, qwen3 and deepseek2"),
        (File { keys: vec![], ..llama() }, "general.architecture`: is missing"),
        (File::new("llama").u32("llama.embedding_length", 8), "llama.attention.head_count`: is missing"),
        (llama().text("llama.block_count", "2"), "llama.block_count`: is the text `2`, not a whole number"),
        (llama().u32("llama.attention.value_length", 8), "value_length`: is 8, but the width of a head's queries is 6"),
        (llama().f32("llama.rope.freq_base", f32::NAN), "llama.rope.freq_base`: is NaN, not a finite number"),
        (deepseek().u32("deepseek2.rope.dimension_count", 11), "is 10, below the rotary part of 11"),
    ] {
        assert!(problem(&file).contains(part), "`{part}` is not in {}", problem(&file));
    }
}

#[test]
fn rotary_scaling_is_read_or_refused() {
    let rope = |file: File| GqaConfig::from_json(&file.read().config_json().unwrap()).map(|config| config.rope);
    let problem = |file: File| match file.read().config_json() {
        Err(error) => error.to_string(),
        Ok(text) => GqaConfig::from_json(&text).unwrap_err().to_string(),
    };
    let linear = RopeScaling::Linear { factor: 4.0 };
    let scaled = |kind: &str| llama().text("llama.rope.scaling.type", kind).f32("llama.rope.scaling.factor", 4.0);
    assert_eq!(rope(scaled("linear")).unwrap().scaling, linear);
    assert_eq!(rope(llama().f32("llama.rope.scale_linear", 4.0)).unwrap().scaling, linear);
    assert_eq!(rope(llama().text("llama.rope.scaling.type", "none")).unwrap().scaling, RopeScaling::None);
    assert_eq!(rope(llama().f32("llama.rope.scaling.factor", 1.0)).unwrap().scaling, RopeScaling::None);
    assert!(problem(scaled("none")).contains("is 4, but rope.scaling.type is none"));
    assert!(
        problem(scaled("longrope")).contains("rope.scaling.type`: `longrope` is not read, only none, linear and yarn")
    );
    let yarn = || scaled("yarn").u32("llama.rope.scaling.original_context_length", 16);
    let RopeScaling::Yarn { factor, mscale, attention_factor, .. } = rope(yarn()).unwrap().scaling else { panic!() };
    assert_eq!((factor, mscale, attention_factor), (4.0, None, None));
    let amplitude = rope(yarn().f32("llama.rope.scaling.yarn_attn_factor", 1.5)).unwrap().amplitude();
    assert_eq!(amplitude, 1.5);
    assert!(problem(scaled("yarn")).contains("original_max_position_embeddings"));
    assert!(problem(yarn().f32("llama.rope.scaling.yarn_log_multiplier", 0.1)).contains("yarn_log_multiplier"));
    assert!(problem(yarn().f32("llama.rope.scaling.yarn_ext_factor", 0.5)).contains("is 0.5, only 1 is computed"));
    assert!(problem(yarn().f32("llama.rope.scaling.attn_factor", 0.5)).contains("attn_factor`: is 0.5, only 1"));
    assert!(problem(llama().f32("llama.rope.scaling.yarn_beta_fast", 8.0)).contains("yarn_beta_fast"));

    // The tensor of factors, as a converter makes it of llama3 scaling, turns as that does.
    let text = LLAMA.replace(
        r#""rope_theta""#,
        r#""rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,
            "original_max_position_embeddings":8192},"rope_theta""#,
    );
    let expected = GqaConfig::from_json(&text).unwrap().rope.frequencies(6);
    let plain = GqaConfig::from_json(LLAMA).unwrap().rope.frequencies(6);
    let factors: Vec<f32> = plain.iter().zip(&expected).map(|(plain, scaled)| (plain / scaled) as f32).collect();
    assert!(factors[0] == 1.0 && factors[2] > 7.9, "{factors:?}");
    let with = |factors: &[f32]| llama().floats("rope_freqs.weight", &[factors.len()], factors);
    let read = rope(with(&factors)).unwrap();
    assert_eq!(read.amplitude(), 1.0);
    for (read, expected) in read.frequencies(6).iter().zip(&expected) {
        assert!((read / expected - 1.0).abs() <= f64::from(f32::EPSILON), "{read}, {expected}");
    }
    assert!(problem(with(&[1.0, 2.0])).contains("tensor `rope_freqs.weight` has 2 elements, must have 3"));
    assert!(
        problem(with(&factors).text("llama.rope.scaling.type", "linear"))
            .contains("is there beside tensor `rope_freqs.weight`")
    );
    assert!(problem(with(&[1.0, 0.0, 1.0])).contains("short_factor"));
    // It is no tensor of a layer.
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("m.gguf"), with(&factors).bytes()).unwrap();
    Checkpoint::open(&folder.path().join("m.gguf")).unwrap().refuse_rest("").unwrap();
}

#[test]
fn text_is_split_as_the_named_model_does() {
    let tokenizer = |pre: &str| with_tokenizer(llama()).text("tokenizer.ggml.pre", pre).read().tokenizer();
    let digits = |pre: &str| tokenizer(pre).unwrap().encode("1234").unwrap();
    let single: Vec<u32> = "1234".bytes().map(u32::from).collect();
    assert_eq!(digits("gpt-2"), [259]);
    assert_eq!(digits("smollm"), single);
    assert_eq!(digits("qwen2"), single);
    assert_eq!(digits("deepseek-v3"), [258, u32::from(b'4')]);
    assert_eq!(digits("default"), [258, u32::from(b'4')]);
    let problem = tokenizer("tekken").unwrap_err().to_string();
    assert!(problem.contains("`tokenizer.ggml.pre` is `tekken`, only gpt-2, smollm"), "{problem}");
    // Begins with a token of its own, unless the file says otherwise.
    assert_eq!(digits("llama-bpe"), [260, 258, u32::from(b'4')]);
    let without =
        with_tokenizer(llama()).text("tokenizer.ggml.pre", "llama-bpe").bool("tokenizer.ggml.add_bos_token", false);
    assert_eq!(without.read().tokenizer().unwrap().encode("1").unwrap(), [u32::from(b'1')]);
    let both =
        with_tokenizer(llama()).bool("tokenizer.ggml.add_bos_token", true).bool("tokenizer.ggml.add_eos_token", true);
    assert_eq!(both.read().tokenizer().unwrap().encode("1").unwrap(), [260, u32::from(b'1'), 260]);

    for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-v3", "default"] {
        let tokenizer = tokenizer(pre).unwrap();
        assert_eq!(tokenizer.vocab_size(), 262);
        let ids = tokenizer.encode(TEXT).unwrap();
        assert!(ids.contains(&260) && ids.contains(&261) && ids.contains(&256), "{pre}: {ids:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), TEXT.replace("<|end|>", ""), "{pre}");
    }
    let file = with_tokenizer(llama()).u32("tokenizer.ggml.eot_token_id", 261).read();
    assert_eq!(file.special_id("eos").unwrap(), Some(260));
    assert_eq!(file.special_id("eot").unwrap(), Some(261));
    assert_eq!(file.special_id("eom").unwrap(), None);
    assert_eq!(file.chat_template().unwrap(), Some("{{ messages }}"));
}

#[test]
fn tokenizers_that_do_not_fit_are_refused() {
    let of = || with_tokenizer(llama());
    let token = |token: &str| vec![token.to_owned(); 1];
    let long = |prefix: &str| (0..262).map(|id| format!("{prefix}{id}")).collect::<Vec<_>>();
    let without = |key: &str| {
        let mut file = of();
        file.keys.retain(|(known, _)| known != key);
        file
    };
    for (file, part) in [
        (of().text("tokenizer.ggml.model", "bert"), "`tokenizer.ggml.model` is `bert`, only gpt2 and llama are read"),
        (without("tokenizer.ggml.model"), "`tokenizer.ggml.model` is missing"),
        (without("tokenizer.ggml.tokens"), "`tokenizer.ggml.tokens` is missing"),
        (without("tokenizer.ggml.merges"), "`tokenizer.ggml.merges` is missing"),
        (of().u32("tokenizer.ggml.tokens", 1), "`tokenizer.ggml.tokens` is no list of texts"),
        (of().texts("tokenizer.ggml.tokens", &token("a")), "1 tokens, but 262 types of tokens"),
        (of().texts("tokenizer.ggml.tokens", &vec!["a".to_owned(); 262]), "tokens 0 and 1 are both `a`"),
        (of().texts("tokenizer.ggml.merges", &token("ab")), "merge `ab` is not of two tokens"),
        (of().texts("tokenizer.ggml.merges", &token("a xyz")), "xyz"),
        (of().texts("tokenizer.ggml.tokens", &long("t")), "out of vocabulary"),
        (of().text("tokenizer.ggml.model", "llama"), "`tokenizer.ggml.scores` is no list of a number per token"),
        (
            of().bool("tokenizer.ggml.add_bos_token", true).u32("tokenizer.ggml.bos_token_id", 262),
            "`tokenizer.ggml.bos_token_id` is 262, but there are 262 tokens",
        ),
        (
            without("tokenizer.ggml.bos_token_id").bool("tokenizer.ggml.add_bos_token", true),
            "`tokenizer.ggml.bos_token_id` is missing, but texts are to have that token",
        ),
    ] {
        let error = file.read().tokenizer().unwrap_err().to_string();
        assert!(error.starts_with("tokenizer: ") && error.contains(part), "`{part}` is not in `{error}`");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    fs::write(&path, of().u32("llama.vocab_size", 261).bytes()).unwrap();
    let error = ModelFolder::open(&path).unwrap_err().to_string();
    assert!(error.contains("m.gguf: tokenizer: the vocabulary needs 262 rows of the embedding"), "{error}");
}

/// SentencePiece's rule, plainly: of all neighbours that make a token, the pair whose token has the highest score, the first of
/// equals, becomes one.
fn pieces(text: &str, scores: &BTreeMap<String, f32>) -> Vec<String> {
    let mut pieces: Vec<String> = format!("▁{}", text.replace(' ', "▁")).chars().map(String::from).collect();
    loop {
        let best = (1..pieces.len()).filter_map(|at| {
            let score = *scores.get(&[&*pieces[at - 1], &*pieces[at]].concat())?;
            Some((score, at))
        });
        let Some((_, at)) = best.reduce(|best, next| if next.0 > best.0 { next } else { best }) else { return pieces };
        let right = pieces.remove(at);
        pieces[at - 1] += &right;
    }
}

#[test]
fn a_sentencepiece_vocabulary_is_merged_by_its_scores() {
    let mut random = fastrand::Rng::with_seed(9);
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    let letters = ["▁", "a", "b", "c", "d"];
    tokens.extend(letters.map(str::to_owned));
    // Pairs, and triples and quadruples of them.
    for length in [2, 3, 4] {
        for _ in 0..25 {
            let token: String = (0..length).map(|_| letters[random.usize(..5)]).collect();
            if !tokens.contains(&token) {
                tokens.push(token);
            }
        }
    }
    let scores: Vec<f32> = {
        let mut scores: Vec<f32> = (0..tokens.len()).map(|id| -(id as f32)).collect();
        random.shuffle(&mut scores[264..]);
        scores
    };
    let types = (0..tokens.len()).map(|id| match id {
        0 => 2,
        1 | 2 => 3,
        3..259 => 6,
        _ => 1i32,
    });
    let file = llama()
        .text("tokenizer.ggml.model", "llama")
        .texts("tokenizer.ggml.tokens", &tokens)
        .key(
            "tokenizer.ggml.scores",
            list(6, &scores.iter().map(|score| score.to_le_bytes().to_vec()).collect::<Vec<_>>()),
        )
        .key("tokenizer.ggml.token_type", list(5, &types.map(|kind| kind.to_le_bytes().to_vec()).collect::<Vec<_>>()))
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.unknown_token_id", 0);
    let tokenizer = file.read().tokenizer().unwrap();
    let by_token: BTreeMap<_, _> = tokens.iter().cloned().zip(scores).skip(259).collect();
    let mut merged = 0;
    for _ in 0..300 {
        let text: String = (0..random.usize(1..20)).map(|_| [" ", "a", "b", "c", "d"][random.usize(..5)]).collect();
        let expected = pieces(&text, &by_token);
        let ids: Vec<u32> =
            expected.iter().map(|it| tokens.iter().position(|token| token == it).unwrap() as u32).collect();
        merged += usize::from(ids.len() < text.chars().count());
        assert_eq!(tokenizer.encode(&text).unwrap(), [&[1], &ids[..]].concat(), "`{text}`");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
    assert!(merged > 100, "the test merges");
    // A character without a token is its bytes.
    let ids = tokenizer.encode("\u{e9}").unwrap();
    assert_eq!(ids, [1, tokens.iter().position(|it| it == "▁").unwrap() as u32, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "\u{e9}");
    let bare = file.bool("tokenizer.ggml.add_space_prefix", false).bool("tokenizer.ggml.add_bos_token", false);
    assert_eq!(bare.read().tokenizer().unwrap().encode("a").unwrap(), [260]);
}
