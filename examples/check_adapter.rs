//! Are the kernels right on this user's adapter? Every case of one operation, or of all, against f64 on your own device.
//! Behind the feature `check`: for a diagnostics page, or for a first start on hardware that nobody has tried.

use std::collections::BTreeMap;

use egmla::{Kernels, wgpu};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // `cargo run --example check_adapter -- attention` takes the operations whose name contains it; `all` takes everything.
    let filter = std::env::args().nth(1).unwrap_or("norm".to_owned());
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let required_features = adapter.features() & egmla::low_level::kernels::optional_features();
    let descriptor = wgpu::DeviceDescriptor { required_features, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))?;
    let kernels = Kernels::new(&device, &queue)?;

    // Of each kernel: comparisons, those that were skipped for want of a feature, and the worst error of its tolerance.
    let mut verdicts = BTreeMap::<&str, (usize, usize, f64)>::new();
    let mut wrong = Vec::new();
    for case in egmla::check::cases() {
        if filter != "all" && !case.kernel().contains(&filter) {
            continue;
        }
        let (compared, skipped, worst) = verdicts.entry(case.kernel()).or_default();
        for outcome in case.run(&kernels)? {
            *compared += outcome.comparisons;
            *skipped += usize::from(outcome.skipped);
            *worst = worst.max(outcome.error / outcome.tolerance.max(f64::MIN_POSITIVE));
            match outcome.verdict {
                Err(problem) if !outcome.skipped => {
                    wrong.push(format!("{} [{}]: {problem}", case.id(), outcome.tuning))
                }
                _ => {}
            }
        }
    }
    println!("{}", adapter.get_info().name);
    for (kernel, (compared, skipped, worst)) in &verdicts {
        println!("{kernel}: {compared} comparisons, {skipped} skipped, worst {:.0} % of its tolerance", 100.0 * worst);
    }
    if verdicts.is_empty() {
        return Err(format!("no operation is named like `{filter}`").into());
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n").into()) }
}
