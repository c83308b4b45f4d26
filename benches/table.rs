//! The rows of `egmla bench` under criterion: device time where the adapter has timestamps, else wall time.
//!
//! `cargo bench -- decode` selects. Compare rows of one run only: machines drift. Rows of longer caches than the quick
//! suite's are left to `egmla bench --suite full`.

use std::time::Duration;

use criterion::Criterion;
use egmla::bench::timer::Timer;
use egmla::bench::{Stock, Suite, rows};
use egmla::low_level::kernels::optional_features;
use egmla::{Kernels, wgpu};

type Failure = Box<dyn std::error::Error>;

fn run(criterion: &mut Criterion) -> Result<(), Failure> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    // As the program opens it: the variants that the adapter offers, and its buffer sizes.
    let offered = adapter.limits();
    let required_limits = wgpu::Limits {
        max_buffer_size: offered.max_buffer_size,
        max_storage_buffer_binding_size: offered.max_storage_buffer_binding_size,
        ..wgpu::Limits::default().or_worse_values_from(&offered)
    };
    let required_features = adapter.features() & (optional_features() | wgpu::Features::TIMESTAMP_QUERY);
    let descriptor = wgpu::DeviceDescriptor { required_features, required_limits, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))?;
    println!("adapter: {:?}", adapter.get_info());
    let kernels = Kernels::new(&device, &queue)?;
    let timer = Timer::new(&kernels)?;
    let mut stock = Stock::default();
    for row in rows().iter().filter(|row| row.is_in(Suite::Quick)) {
        let mut prepared = match row.prepare(&kernels, &mut stock) {
            Ok(prepared) => prepared,
            Err(error) if error.is_of_device() => return Err(error.into()),
            Err(error) => {
                println!("{}: not measured: {error}", row.id());
                continue;
            }
        };
        let mut failure = None;
        criterion.bench_function(row.id(), |bencher| {
            bencher.iter_custom(|runs| {
                let one = |_| timer.run(&mut prepared.recording).map(|elapsed| elapsed.device_us);
                let total = (0..runs).map(one).sum::<egmla::Result<f64>>();
                let microseconds = total.unwrap_or_else(|error| {
                    failure = Some(error);
                    1.0
                });
                Duration::from_secs_f64(microseconds.max(1e-3) / 1e6)
            });
        });
        if let Some(error) = failure {
            return Err(error.into());
        }
    }
    Ok(())
}

fn main() {
    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    if let Err(failure) = run(&mut criterion) {
        eprintln!("error: {failure}");
        std::process::exit(1);
    }
    criterion.final_summary();
}
