#![no_main]
//! A weight in e4m3 with factors of any shape: refused, or each element its code's value times the factor of its block.

use arbitrary::{Result, Unstructured};
use egmla::weights::Checkpoint;
use egmla_fuzz::bounded;
use libfuzzer_sys::fuzz_target;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let extent = |u: &mut Unstructured<'_>| u.int_in_range(0..=20usize);
    let (shape, block) = ([extent(u)?, extent(u)?], [u.int_in_range(1..=9u32)?, u.int_in_range(1..=9u32)?]);
    let blocks = [0, 1].map(|i| shape[i].div_ceil(block[i] as usize));
    let factors = match u.int_in_range(0..=4u8)? {
        0 => vec![],
        1 => vec![1],
        2 => vec![extent(u)?, extent(u)?],
        _ => blocks.to_vec(),
    };
    let codes: Vec<u8> = (0..shape[0] * shape[1]).map(|_| u.arbitrary()).collect::<Result<_>>()?;
    let scales: Vec<f32> =
        (0..factors.iter().product::<usize>()).map(|_| u.arbitrary().map(f32::from_bits)).collect::<Result<_>>()?;
    let bytes: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    let views = [
        ("w.weight", TensorView::new(Dtype::F8_E4M3, shape.to_vec(), &codes)),
        ("w.weight_scale_inv", TensorView::new(Dtype::F32, factors.clone(), &bytes)),
    ];
    let views = views.map(|(name, view)| (name, view.expect("a tensor of its shape")));
    let file = safetensors::serialize(views, None).expect("a file");
    let read = || Checkpoint::new(&file).and_then(|file| file.with_block_size(block).take("w.weight", &shape));
    let one = factors.is_empty() || factors == [1];
    let Ok(found) = bounded(file.len(), read) else {
        assert!(!one && factors != blocks, "{shape:?} in {block:?} with {factors:?} is refused");
        return Ok(());
    };
    assert_eq!(found.data.len(), codes.len());
    for (i, (found, code)) in found.data.iter().zip(codes).enumerate() {
        let (row, column) = (i / shape[1], i % shape[1]);
        let at = row / block[0] as usize * blocks[1] + column / block[1] as usize;
        let expected = value(code) * if one { scales[0] } else { scales[at] };
        assert!(
            found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(),
            "{found}, not {expected}"
        );
    }
    Ok(())
}

/// By the definition, in double precision.
fn value(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7) / 8.0);
    let size = match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => fraction * 2f64.powi(-6),
        _ => (1.0 + fraction) * 2f64.powi(exponent - 7),
    };
    (if code >> 7 == 1 { -size } else { size }) as f32
}
