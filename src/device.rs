//! The kernels of a device: pipelines, buffers, and their errors.
//!
//! Nothing here submits, polls or maps for reading.

use std::collections::HashMap;
use std::future::Future;
use std::pin::pin;
#[cfg(not(target_arch = "wasm32"))]
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::adapter::{AdapterClass, COOPERATIVE_FEATURES, Cooperative, LeftOut, PlanContext, Tunings};
use crate::error::{ArgumentError, BufferError, Error, Result};
use crate::fault::Faults;
use crate::op::{Access, Binding, MAX_BINDINGS, Spec};
use crate::storage::padded;
use crate::vouched;

/// A range of a buffer. Cloning it clones a handle, not the memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Region {
    /// The buffer.
    pub buffer: wgpu::Buffer,
    /// First byte; a multiple of the device's `min_storage_buffer_offset_alignment`.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

impl Region {
    /// A range of a buffer.
    pub fn new(buffer: &wgpu::Buffer, offset: u64, size: u64) -> Self {
        Region { buffer: buffer.clone(), offset, size }
    }
}

impl Region {
    /// Refuses a region that is too small for `needed` bytes, or that no shader can bind.
    ///
    /// # Errors
    /// `BufferError::Usage`, `BufferError::Offset`, `BufferError::Size`, or [`Error::Limit`] for more bytes than a binding
    /// holds; with the names of the operation and of the argument.
    pub(crate) fn check(
        &self,
        kernel: &'static str,
        binding: &'static str,
        needed: u64,
        limits: &wgpu::Limits,
    ) -> Result<()> {
        let Region { buffer, offset, size } = self;
        if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return Err(Error::Buffer(BufferError::Usage { kernel, binding }));
        }
        let alignment = u64::from(limits.min_storage_buffer_offset_alignment);
        if !offset.is_multiple_of(alignment) {
            return Err(Error::Buffer(BufferError::Offset { kernel, binding, offset: *offset, alignment }));
        }
        let found = buffer.size().saturating_sub(*offset).min(*size);
        if needed > found {
            return Err(Error::Buffer(BufferError::Size { kernel, binding, needed, found }));
        }
        if needed > limits.max_storage_buffer_binding_size {
            return Err(Error::Limit {
                what: format!("{kernel}: `{binding}`"),
                needed,
                allowed: limits.max_storage_buffer_binding_size,
                limit: "max_storage_buffer_binding_size",
            });
        }
        Ok(())
    }
}

impl From<&wgpu::Buffer> for Region {
    fn from(buffer: &wgpu::Buffer) -> Self {
        Region::new(buffer, 0, buffer.size())
    }
}

#[derive(Debug)]
pub(crate) struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
}

/// Text of the shader by its address, since an application may give its own the name of another; whether it is vouched for; and
/// the overrides.
type PipelineKey = (usize, bool, Vec<(&'static str, u64)>);

/// Source, bindings and constants of a pipeline.
#[derive(Debug, Clone)]
pub(crate) struct Shader {
    pub spec: &'static Spec,
    pub bindings: &'static [Binding],
    pub overrides: Vec<(&'static str, f64)>,
    /// The library vouches for its loops and indices.
    pub vouched: bool,
    pub key: PipelineKey,
}

impl Shader {
    pub fn new(
        spec: &'static Spec,
        bindings: &'static [Binding],
        overrides: Vec<(&'static str, f64)>,
        vouched: bool,
    ) -> Self {
        let bits = overrides.iter().map(|&(name, value)| (name, value.to_bits())).collect();
        Shader { spec, bindings, overrides, vouched, key: (spec.source.as_ptr() as usize, vouched, bits) }
    }
}

/// Bytes from one absent output of a dispatch to the next; a multiple of every device's storage offset alignment.
const SINK_PITCH: u64 = 256;

/// What the caller may choose.
#[derive(Debug, Clone)]
struct Settings {
    context: PlanContext,
    /// The driver's pipeline cache, if the caller brought one.
    pipeline_cache: Option<wgpu::PipelineCache>,
    /// wgpu's run-time checks also in shaders that the library vouches for.
    checked: bool,
}

/// A device, and what is known of its faults.
#[derive(Debug, Clone)]
pub(crate) struct Watched {
    device: wgpu::Device,
    faults: Faults,
}

#[derive(Debug)]
struct Inner {
    watched: Watched,
    queue: wgpu::Queue,
    /// Shared by all kernels from one call of [`Kernels::new`], and so of one device.
    family: u64,
    settings: Settings,
    pipelines: Mutex<HashMap<PipelineKey, Arc<Pipeline>>>,
    /// Bound in place of an absent optional input.
    absent: wgpu::Buffer,
    /// Bound in place of an absent optional output.
    sink: wgpu::Buffer,
}

/// The kernels of one device: pipelines compile at first use and are kept. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Kernels(Arc<Inner>);

impl Kernels {
    /// Takes the caller's device and its queue, through which recordings write parameters. Compiles nothing yet.
    ///
    /// # Errors
    /// `DeviceError::Lost`, `DeviceError::OutOfMemory`; [`Error::Limit`] if the device has fewer storage buffers than WebGPU
    /// promises.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Result<Self> {
        Self::with_class(device, queue, AdapterClass::of(&device.adapter_info()))
    }

    /// The same, with tile sizes for another class of adapter: to compare classes, or to check on this device what another will
    /// run.
    ///
    /// # Errors
    /// As [`Kernels::new`].
    pub fn with_class(device: &wgpu::Device, queue: &wgpu::Queue, class: AdapterClass) -> Result<Self> {
        let mut limits = device.limits();
        if limits.max_storage_buffers_per_shader_stage < 8 {
            return Err(Error::Limit {
                what: "a kernel's storage buffers".to_owned(),
                needed: 8,
                allowed: limits.max_storage_buffers_per_shader_stage.into(),
                limit: "max_storage_buffers_per_shader_stage",
            });
        }
        limits.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size.min(PlanContext::MOST_BINDING);
        let (features, info) = (device.features(), device.adapter_info());
        // wgpu's Metal backend reports the extremes over all GPUs; Apple's have simdgroups of 32.
        let apple = info.backend == wgpu::Backend::Metal && AdapterClass::of(&info) == AdapterClass::Apple;
        let (subgroup_min_size, subgroup_max_size) =
            if apple { (32, 32) } else { (info.subgroup_min_size, info.subgroup_max_size) };
        let context = PlanContext { features, subgroup_min_size, subgroup_max_size, ..PlanContext::new(limits, class) };
        let watched = Watched { device: device.clone(), faults: Faults::default() };
        let empty = |label: &str, size: u64| {
            watched.scoped(label, || {
                device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some(label),
                    size,
                    usage: wgpu::BufferUsages::STORAGE,
                    mapped_at_creation: false,
                })
            })
        };
        let (absent, sink) = (empty("egmla.absent", 16)?, empty("egmla.sink", SINK_PITCH * MAX_BINDINGS as u64)?);
        watched.alive("opening kernels")?;
        let (queue, pipelines) = (queue.clone(), Mutex::default());
        static FAMILIES: AtomicU64 = AtomicU64::new(0);
        let family = FAMILIES.fetch_add(1, Ordering::Relaxed);
        let settings = Settings { context, pipeline_cache: None, checked: false };
        Ok(Kernels(Arc::new(Inner { watched, queue, family, settings, pipelines, absent, sink })))
    }

    /// The same device and settings, nothing compiled, no pipeline cache: to measure a first use.
    pub fn uncompiled(&self) -> Self {
        self.with(|settings| settings.pipeline_cache = None)
    }

    /// The same, with the adapter's cooperative matrices, for f16 weights and caches. A device does not report its sizes: pass
    /// [`Cooperative::of`] of `wgpu::Adapter::cooperative_matrix_properties`, and open the device with
    /// [`COOPERATIVE_FEATURES`]; without those features this changes nothing.
    pub fn with_cooperative(&self, matrices: Cooperative) -> Self {
        let opened = self.context().features.contains(COOPERATIVE_FEATURES);
        self.with(|settings| settings.context.cooperative = if opened { matrices } else { Cooperative::NONE })
    }

    /// The same, with a driver's pipeline cache. The caller makes it from the bytes of an earlier run
    /// (`wgpu::Device::create_pipeline_cache`, which needs `Features::PIPELINE_CACHE`; name their file by
    /// `wgpu::util::pipeline_cache_key`) and keeps its bytes afterwards (`wgpu::PipelineCache::get_data`).
    ///
    /// A cache that the device refuses costs time, not results: pipelines then compile without it.
    pub fn with_pipeline_cache(&self, cache: wgpu::PipelineCache) -> Self {
        self.with(|settings| settings.pipeline_cache = Some(cache))
    }

    /// The same, with measured tile settings for `Tuning::Auto`.
    ///
    /// # Errors
    /// [`Error::Config`] for a kernel or a setting that does not exist.
    pub fn with_tunings(&self, tunings: Tunings) -> Result<Self> {
        tunings.check()?;
        Ok(self.with(|settings| settings.context.tunings = tunings))
    }

    /// The same, without some kernels: others of their operations run instead. See `check::prove`.
    pub fn leaving_out(&self, kernels: LeftOut) -> Self {
        self.with(|settings| settings.context.left_out = kernels)
    }

    /// The same device and buffers with plans for another device: to export recordings, which may not run here.
    #[cfg(feature = "check")]
    pub(crate) fn planned_for(&self, context: PlanContext) -> Self {
        self.with(|settings| (settings.context, settings.pipeline_cache) = (context, None))
    }

    /// The same, with wgpu's run-time checks of loops and indices in every shader, or only in those that the library does not
    /// vouch for, which is what [`Kernels::new`] gives. With them kernels took 3 to 10 times as long on a GPU; results are the same.
    /// An application whose policy forbids unchecked shaders switches them on; in a browser they are always on.
    pub fn with_shader_checks(&self, on: bool) -> Self {
        self.with(|settings| settings.checked = on)
    }

    /// Whether wgpu checks loops and indices of every shader.
    pub fn shader_checks(&self) -> bool {
        self.0.settings.checked || cfg!(target_arch = "wasm32")
    }

    fn with(&self, change: impl FnOnce(&mut Settings)) -> Self {
        let Inner { watched, queue, family, settings, absent, sink, .. } = &*self.0;
        let mut settings = settings.clone();
        change(&mut settings);
        Kernels(Arc::new(Inner {
            watched: watched.clone(),
            queue: queue.clone(),
            family: *family,
            settings,
            pipelines: Mutex::default(),
            absent: absent.clone(),
            sink: sink.clone(),
        }))
    }

    /// The caller's device.
    pub fn device(&self) -> &wgpu::Device {
        &self.0.watched.device
    }

    /// The device with what is known of its faults.
    pub(crate) fn watched(&self) -> &Watched {
        &self.0.watched
    }

    pub(crate) fn faults(&self) -> &Faults {
        &self.0.watched.faults
    }

    /// The caller's queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.0.queue
    }

    /// The context of plans.
    pub fn context(&self) -> &PlanContext {
        &self.0.settings.context
    }

    /// The region of an absent buffer of an operation.
    pub fn absent(&self) -> Region {
        Region::from(&self.0.absent)
    }

    /// The region bound for an absent optional output, one per binding number; the kernel's override keeps it unwritten.
    pub(crate) fn sink(&self, binding: usize) -> Region {
        Region::new(&self.0.sink, SINK_PITCH * binding as u64, 16)
    }

    /// Allocates a storage buffer that can be copied from and to; at least 16 bytes.
    ///
    /// # Errors
    /// [`Error::Limit`] above `max_buffer_size`, `DeviceError::OutOfMemory`, `DeviceError::Lost`.
    pub fn allocate(&self, label: &str, bytes: u64) -> Result<wgpu::Buffer> {
        let buffer = self.buffer(label, self.allocation(label, bytes)?, STORAGE_USAGE)?;
        self.watched().alive(label).map(|()| buffer)
    }

    pub(crate) fn buffer(&self, label: &str, size: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false };
        self.watched().scoped(label, || self.device().create_buffer(&descriptor))
    }

    /// Refuses `of` of another device, which wgpu would refuse much later, in the caller's own encoder.
    ///
    /// # Errors
    /// `ArgumentError::OtherDevice`.
    pub(crate) fn same_device(&self, of: &Kernels, what: &'static str, than: &'static str) -> Result<()> {
        let same =
            self.0.family == of.0.family || self.device() == of.device() && one_device(self.device(), of.device());
        if same { Ok(()) } else { Err(Error::Argument(ArgumentError::OtherDevice { what, than })) }
    }

    /// Allocates a storage buffer that begins with `bytes`. The bytes are in place before any later submission.
    ///
    /// # Errors
    /// As [`Kernels::allocate`].
    pub fn upload(&self, label: &str, bytes: &[u8]) -> Result<wgpu::Buffer> {
        self.upload_parts(label, bytes.len() as u64, |write| {
            write(0, bytes);
            Ok(())
        })
    }

    /// The same of `bytes` bytes that come in parts, each with the byte that it begins at: no copy of the whole is made on the way.
    /// What no part covers is 0.
    ///
    /// # Errors
    /// As [`Kernels::allocate`]; those of `parts`.
    pub(crate) fn upload_parts(
        &self,
        label: &str,
        bytes: u64,
        parts: impl FnOnce(&mut dyn FnMut(usize, &[u8])) -> Result<()>,
    ) -> Result<wgpu::Buffer> {
        let size = self.allocation(label, bytes)?;
        let watched = self.watched();
        watched.scoped(label, || {
            let buffer = watched.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size,
                usage: STORAGE_USAGE,
                mapped_at_creation: true,
            });
            // No error in any scope, yet not mapped: the device is lost.
            let mut mapped = buffer.get_mapped_range_mut(..).map_err(|error| watched.faults.lost(label, error))?;
            parts(&mut |at, part| mapped.slice(at..at + part.len()).copy_from_slice(part))?;
            drop(mapped);
            buffer.unmap();
            Ok(buffer)
        })?
    }

    fn allocation(&self, label: &str, bytes: u64) -> Result<u64> {
        let size = padded(bytes, 4).max(16);
        let allowed = self.0.settings.context.limits.max_buffer_size;
        if size > allowed {
            let what = format!("buffer `{label}`");
            return Err(Error::Limit { what, needed: size, allowed, limit: "max_buffer_size" });
        }
        Ok(size)
    }

    fn known_pipelines(&self) -> MutexGuard<'_, HashMap<PipelineKey, Arc<Pipeline>>> {
        self.0.pipelines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pipelines of these dispatches, in order. New ones compile now, on as many threads as the machine has.
    pub(crate) fn pipelines<'a>(
        &self,
        shaders: impl Iterator<Item = &'a Shader> + Clone,
    ) -> Result<Vec<Arc<Pipeline>>> {
        let mut missing: Vec<&Shader> = Vec::new();
        {
            let known = self.known_pipelines();
            for shader in shaders.clone() {
                let listed = missing.iter().any(|other| other.key == shader.key);
                if !listed && !known.contains_key(&shader.key) {
                    missing.push(shader);
                }
            }
        }
        let compiled = self.compile_all(&missing)?;
        if !compiled.is_empty() {
            self.watched().alive("compiling")?;
        }
        for (shader, pipeline) in missing.iter().zip(compiled) {
            // Compiled outside of the lock: two threads may both compile a kernel, neither waits for another's.
            self.known_pipelines().entry(shader.key.clone()).or_insert(pipeline);
        }
        let known = self.known_pipelines();
        let of = |shader: &Shader| {
            known.get(&shader.key).cloned().ok_or_else(|| Error::problem(shader.spec.name, "was not compiled"))
        };
        shaders.map(of).collect()
    }

    #[cfg(target_arch = "wasm32")]
    fn compile_all(&self, missing: &[&Shader]) -> Result<Vec<Arc<Pipeline>>> {
        missing.iter().map(|shader| self.pipeline(shader)).collect()
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn compile_all(&self, missing: &[&Shader]) -> Result<Vec<Arc<Pipeline>>> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(missing.len());
        if threads < 2 {
            return missing.iter().map(|shader| self.pipeline(shader)).collect();
        }
        // Compile times differ: each thread takes the next free kernel.
        let next = AtomicUsize::new(0);
        let work = || {
            let take = || missing.get(next.fetch_add(1, Ordering::Relaxed));
            std::iter::from_fn(take).map(|shader| (shader.key.clone(), self.pipeline(shader))).collect::<Vec<_>>()
        };
        let mut compiled: HashMap<PipelineKey, Result<Arc<Pipeline>>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let own = work();
            workers.into_iter().filter_map(|worker| worker.join().ok()).flatten().chain(own).collect()
        });
        let of = |shader: &&Shader| {
            let lost = || Err(Error::problem(shader.spec.name, "the thread that compiled it ended early"));
            compiled.remove(&shader.key).unwrap_or_else(lost)
        };
        missing.iter().map(of).collect()
    }

    /// Compiles with the driver's cache, or without it if the device refuses it: a cache of another device or driver poisons
    /// every pipeline made with it.
    fn pipeline(&self, shader: &Shader) -> Result<Arc<Pipeline>> {
        let pipeline = match &self.0.settings.pipeline_cache {
            None => self.compile(shader, None)?,
            Some(cache) => self.compile(shader, Some(cache)).or_else(|error| {
                tracing::warn!(kernel = shader.spec.name, %error, "compiling without the pipeline cache");
                self.compile(shader, None)
            })?,
        };
        Ok(Arc::new(pipeline))
    }

    fn compile(&self, shader: &Shader, cache: Option<&wgpu::PipelineCache>) -> Result<Pipeline> {
        let Shader { spec, bindings, overrides, vouched, .. } = shader;
        let device = self.device();
        let label = format!("egmla.{}", spec.name);
        tracing::debug!(kernel = spec.name, ?overrides, "compiling");
        self.watched().scoped(&label, || {
            let module = if *vouched && !self.0.settings.checked {
                vouched::shader_module(device, &label, spec.source)
            } else {
                device.create_shader_module(wgpu::ShaderModuleDescriptor {
                    label: Some(&label),
                    source: wgpu::ShaderSource::Wgsl(spec.source.into()),
                })
            };
            let storage = bindings
                .iter()
                .map(|binding| wgpu::BufferBindingType::Storage { read_only: binding.access == Access::Read });
            let entries: Vec<_> = (0..)
                .zip(std::iter::once(wgpu::BufferBindingType::Uniform).chain(storage))
                .map(|(number, ty)| wgpu::BindGroupLayoutEntry {
                    binding: number,
                    visibility: wgpu::ShaderStages::COMPUTE,
                    ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: number == 0, min_binding_size: None },
                    count: None,
                })
                .collect();
            let layout = device
                .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(&label), entries: &entries });
            let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: Some(&label),
                bind_group_layouts: &[Some(&layout)],
                immediate_size: 0,
            });
            let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(&label),
                layout: Some(&pipeline_layout),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    constants: overrides,
                    // Every kernel writes its workgroup memory before it reads it. naga's zeros are one assignment of the whole
                    // array, which AMD's compiler in Mesa does not finish for 45 KiB.
                    zero_initialize_workgroup_memory: false,
                },
                cache,
            });
            Pipeline { pipeline, layout }
        })
    }
}

const STORAGE_USAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);

impl Watched {
    /// Runs `create` and turns wgpu's errors into an error value.
    ///
    /// On native backends the answer is there at once. In a browser it comes later, to the page's own error handler.
    pub fn scoped<T>(&self, what: &str, create: impl FnOnce() -> T) -> Result<T> {
        let scopes = [wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::OutOfMemory]
            .map(|filter| self.device.push_error_scope(filter));
        let created = create();
        // The last scope is popped first. Without memory there is no object, and validation refuses it: the cause comes first.
        let errors: Vec<_> = scopes.into_iter().rev().map(|scope| ready(scope.pop()).flatten()).collect();
        match errors.into_iter().flatten().next() {
            None => Ok(created),
            // wgpu reports nothing on a lost device, and later refuses the object.
            Some(error @ wgpu::Error::Validation { .. }) => Err(self.lost_or(what, Error::wgpu(what, &error))),
            Some(error) => Err(Error::wgpu(what, &error)),
        }
    }

    /// Fails on a lost device, where creating, submitting and polling report success. Only mapping a buffer fails: this maps one
    /// at its creation, as [`Kernels::upload`] does. In a browser even that succeeds; there the page's own promise reports the loss.
    ///
    /// # Errors
    /// `DeviceError::Lost`; `DeviceError::OutOfMemory` without room for 4 bytes.
    pub fn alive(&self, what: &str) -> Result<()> {
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let probe = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("egmla.alive"),
            size: 4,
            // Mapped itself, without a staging buffer.
            usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: true,
        });
        if let Some(error) = ready(memory.pop()).flatten() {
            return Err(Error::wgpu(what, &error));
        }
        probe.get_mapped_range_mut(..).map(drop).map_err(|error| self.faults.lost(what, error))
    }

    /// The error of a call that failed, or that the device is lost, which explains it.
    pub fn lost_or(&self, what: &str, error: Error) -> Error {
        self.alive(what).err().unwrap_or(error)
    }
}

fn ready<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// Whether two devices that compare as equal are one. Natively wgpu compares numbers that restart in every instance, so this
/// causes an error on one device and looks for it in a scope of the other.
fn one_device(a: &wgpu::Device, b: &wgpu::Device) -> bool {
    if cfg!(target_arch = "wasm32") {
        return true;
    }
    let outer = a.push_error_scope(wgpu::ErrorFilter::Validation);
    let inner = b.push_error_scope(wgpu::ErrorFilter::Validation);
    // Refused before anything happens: a buffer without any usage.
    drop(a.create_buffer(&wgpu::BufferDescriptor {
        label: Some("egmla.one_device"),
        size: 4,
        usage: wgpu::BufferUsages::empty(),
        mapped_at_creation: false,
    }));
    let caught = ready(inner.pop()).flatten().is_some();
    drop(ready(outer.pop()));
    caught
}
