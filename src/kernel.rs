//! From a WGSL file and its binding list to commands in the caller's pass.
//!
//! [`Kernels`] owns the pipelines of one device. A [`Recording`] collects dispatches, checked as they are added, and
//! writes them into a compute pass of the caller's: nothing here submits, polls or maps for reading, and a recording
//! that met an error has recorded nothing.

use std::collections::HashMap;
use std::future::Future;
use std::pin::pin;
#[cfg(not(target_arch = "wasm32"))]
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::error::{Error, Result};
use crate::kernels::{COOPERATIVE_FEATURES, REGISTRY};
use crate::adapter::{AdapterClass, Cooperative, PlanContext, Tunings};
use crate::plan::Plan;
use crate::storage::padded;

/// How a shader sees a binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// `var<uniform>`
    Params,
    /// `var<storage, read>`
    Read,
    /// `var<storage, read_write>`
    ReadWrite,
}

/// One binding of a kernel; its number is its place in [`Spec::bindings`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// Name of the variable in the shader.
    pub name: &'static str,
    /// How it is bound.
    pub access: Access,
}

impl Binding {
    pub(crate) const PARAMS: Binding = Binding { name: "params", access: Access::Params };

    pub(crate) const fn read(name: &'static str) -> Self {
        Binding { name, access: Access::Read }
    }

    pub(crate) const fn write(name: &'static str) -> Self {
        Binding { name, access: Access::ReadWrite }
    }
}

/// What is constant of a kernel: its registry line.
#[derive(Debug)]
pub struct Spec {
    /// The one stem: `shaders/<name>.wgsl`, `src/kernels/<name>.rs`, `src/reference/<name>.rs`, label `egmla.<name>`.
    pub name: &'static str,
    /// The file that runs.
    pub source: &'static str,
    /// Bindings in the order of their numbers: params, inputs, outputs, workspace.
    pub bindings: &'static [Binding],
    /// Bytes of the uniform `Params`.
    pub params_size: usize,
    /// How many settings `Tuning::Forced` can choose from.
    pub tunings: usize,
    /// What the device must have beside WebGPU's core. Kernels that need something are variants: another does their work
    /// where it is not offered.
    pub features: wgpu::Features,
    /// The fewest invocations of a subgroup that it is right for; 0 where it has nothing to do with them.
    pub subgroup: u32,
    /// The cooperative matrices that it computes with.
    pub cooperative: Cooperative,
}

impl Spec {
    /// What it needs that a device lacks, by name; `None` when it can run.
    pub fn missing(&self, device: &PlanContext) -> Option<String> {
        let features = self.features - device.features;
        let narrow = device.subgroup_min_size < self.subgroup;
        // Asked before every dispatch: only what is missing is put into words.
        let subgroup = narrow.then(|| format!("subgroups of {} invocations and more", self.subgroup));
        let matrices = self.cooperative.without(device.cooperative).names();
        let matrices = matrices.iter().map(|name| format!("cooperative matrices of {name}"));
        let names = features.iter_names().map(|(name, _)| name.to_lowercase());
        let names: Vec<_> = names.chain(subgroup).chain(matrices).collect();
        (!names.is_empty()).then(|| names.join(", "))
    }
}

/// A range of a buffer. Cloning it clones a handle, not the memory.
#[derive(Debug, Clone)]
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

impl From<&wgpu::Buffer> for Region {
    fn from(buffer: &wgpu::Buffer) -> Self {
        Region::new(buffer, 0, buffer.size())
    }
}

#[derive(Debug)]
struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

type PipelineKey = (&'static str, Vec<(&'static str, u64)>);

#[derive(Debug)]
struct Inner {
    device: wgpu::Device,
    /// Shared by kernels that come from one call of [`Kernels::new`], and thus are of one device.
    family: u64,
    context: PlanContext,
    pipelines: Mutex<HashMap<PipelineKey, Arc<Pipeline>>>,
    /// The driver's own cache of what it compiled, when the caller brought one.
    pipeline_cache: Option<wgpu::PipelineCache>,
    /// Bound where a kernel's optional input is absent.
    absent: wgpu::Buffer,
    /// Bound where a kernel's optional output is absent.
    sink: wgpu::Buffer,
}

/// The kernels of one device: pipelines are compiled at first use and kept. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Kernels(Arc<Inner>);

impl Kernels {
    /// Takes the caller's device. Nothing is compiled yet.
    ///
    /// # Errors
    /// [`Error::DeviceLost`] or [`Error::OutOfMemory`] of the device, [`Error::Limit`] when it offers fewer storage buffers than
    /// WebGPU promises.
    pub fn new(device: &wgpu::Device) -> Result<Self> {
        Self::with_class(device, AdapterClass::of(&device.adapter_info()))
    }

    /// The same, with tile sizes for another class of adapter than the device's own: to compare them, or to check here what
    /// will run there.
    ///
    /// # Errors
    /// As [`Kernels::new`].
    pub fn with_class(device: &wgpu::Device, class: AdapterClass) -> Result<Self> {
        let mut limits = device.limits();
        if limits.max_storage_buffers_per_shader_stage < 8 {
            return Err(Error::Limit {
                what: "a kernel's storage buffers".to_owned(),
                needed: 8,
                allowed: limits.max_storage_buffers_per_shader_stage.into(),
                limit: "max_storage_buffers_per_shader_stage",
            });
        }
        // Shaders index elements with 32 bits.
        limits.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size.min(u64::from(u32::MAX) & !255);
        let (features, info) = (device.features(), device.adapter_info());
        // wgpu's Metal backend tells the smallest and largest of all GPUs; Apple's have simdgroups of 32.
        let apple = info.backend == wgpu::Backend::Metal && AdapterClass::of(&info) == AdapterClass::Apple;
        let (subgroup_min_size, subgroup_max_size) =
            if apple { (32, 32) } else { (info.subgroup_min_size, info.subgroup_max_size) };
        let context = PlanContext { features, subgroup_min_size, subgroup_max_size, ..PlanContext::new(limits, class) };
        let empty = |label: &str| {
            scoped(device, label, || {
                device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some(label),
                    size: 16,
                    usage: wgpu::BufferUsages::STORAGE,
                    mapped_at_creation: false,
                })
            })
        };
        let (absent, sink) = (empty("egmla.absent")?, empty("egmla.sink")?);
        alive(device, "opening kernels")?;
        let (device, pipelines) = (device.clone(), Mutex::default());
        static FAMILIES: AtomicU64 = AtomicU64::new(0);
        let family = FAMILIES.fetch_add(1, Ordering::Relaxed);
        Ok(Kernels(Arc::new(Inner { device, family, context, pipelines, pipeline_cache: None, absent, sink })))
    }

    /// The same device and choices, with nothing compiled yet and no pipeline cache: to measure a first use.
    pub fn uncompiled(&self) -> Self {
        self.with(self.0.context.clone(), None)
    }

    /// The same, with the cooperative matrices of the adapter: a device does not tell which it has, and the kernels that
    /// multiply by them are used only where the caller says so, for weights and caches in f16. Take what
    /// [`Cooperative::of`] finds in `wgpu::Adapter::cooperative_matrix_properties`, and open the device with
    /// [`COOPERATIVE_FEATURES`]; without those features this changes nothing.
    pub fn with_cooperative(&self, matrices: Cooperative) -> Self {
        let opened = self.0.context.features.contains(COOPERATIVE_FEATURES);
        let cooperative = if opened { matrices } else { Cooperative::NONE };
        self.with(PlanContext { cooperative, ..self.0.context.clone() }, self.0.pipeline_cache.clone())
    }

    /// The same, with pipelines that come from and go to the driver's cache. The caller makes it of the bytes that an
    /// earlier run kept (`wgpu::Device::create_pipeline_cache`, which needs `Features::PIPELINE_CACHE`; name their file by
    /// `wgpu::util::pipeline_cache_key`) and keeps its bytes afterwards (`wgpu::PipelineCache::get_data`).
    ///
    /// A cache that the device refuses costs time, not results: the pipeline is then compiled without it.
    pub fn with_pipeline_cache(&self, cache: wgpu::PipelineCache) -> Self {
        self.with(self.0.context.clone(), Some(cache))
    }

    /// The same, with measured tile settings wherever `Tuning::Auto` chooses.
    ///
    /// # Errors
    /// [`Error::Config`] for a kernel or a setting that does not exist.
    pub fn with_tunings(&self, tunings: Tunings) -> Result<Self> {
        for (kernel, &choice) in &tunings.0 {
            let spec = REGISTRY.iter().find(|spec| spec.name == kernel);
            let spec = spec.ok_or_else(|| Error::config(kernel, "there is no such kernel to tune"))?;
            if choice >= spec.tunings {
                let problem = format!("tuning {choice} does not exist, there are {}", spec.tunings);
                return Err(Error::config(kernel, problem));
            }
        }
        Ok(self.with(PlanContext { tunings, ..self.0.context.clone() }, self.0.pipeline_cache.clone()))
    }

    /// The same device and buffers with plans for another device: to record what is to run there. Here it may not run.
    pub(crate) fn planned_for(&self, context: PlanContext) -> Self {
        self.with(context, None)
    }

    fn with(&self, context: PlanContext, pipeline_cache: Option<wgpu::PipelineCache>) -> Self {
        let Inner { device, family, absent, sink, .. } = &*self.0;
        Kernels(Arc::new(Inner {
            device: device.clone(),
            family: *family,
            context,
            pipelines: Mutex::default(),
            pipeline_cache,
            absent: absent.clone(),
            sink: sink.clone(),
        }))
    }

    /// The caller's device.
    pub fn device(&self) -> &wgpu::Device {
        &self.0.device
    }

    /// What plans are made for.
    pub fn context(&self) -> &PlanContext {
        &self.0.context
    }

    /// A region to bind where an optional input is absent; the kernel's override keeps it from being read.
    pub fn absent(&self) -> Region {
        Region::from(&self.0.absent)
    }

    /// A region to bind where an optional output is absent; the kernel's override keeps it from being written.
    pub fn sink(&self) -> Region {
        Region::from(&self.0.sink)
    }

    /// Allocates a storage buffer that can be copied from and to; at least 16 bytes.
    ///
    /// # Errors
    /// [`Error::Limit`] above `max_buffer_size`, [`Error::OutOfMemory`] when the device has no memory left,
    /// [`Error::DeviceLost`] when it is lost.
    pub fn allocate(&self, label: &str, bytes: u64) -> Result<wgpu::Buffer> {
        let size = self.allocation(label, bytes)?;
        let device = &self.0.device;
        let buffer = scoped(device, label, || {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size,
                usage: STORAGE_USAGE,
                mapped_at_creation: false,
            })
        })?;
        alive(device, label).map(|()| buffer)
    }

    /// Fails where `of` belongs to another device: wgpu would refuse it much later, in the caller's own encoder.
    ///
    /// # Errors
    /// [`Error::OtherDevice`].
    pub(crate) fn same_device(&self, of: &Kernels, what: &'static str, than: &'static str) -> Result<()> {
        let same =
            self.0.family == of.0.family || self.0.device == of.0.device && one_device(&self.0.device, &of.0.device);
        if same { Ok(()) } else { Err(Error::OtherDevice { what, than }) }
    }

    /// Allocates a storage buffer that begins with `bytes`. The bytes are in place before any later submission.
    ///
    /// # Errors
    /// As [`Kernels::allocate`].
    pub fn upload(&self, label: &str, bytes: &[u8]) -> Result<wgpu::Buffer> {
        let size = self.allocation(label, bytes.len() as u64)?;
        self.filled(label, size, STORAGE_USAGE, bytes)
    }

    fn allocation(&self, label: &str, bytes: u64) -> Result<u64> {
        let size = padded(bytes, 4).max(16);
        let allowed = self.0.context.limits.max_buffer_size;
        if size > allowed {
            let what = format!("buffer `{label}`");
            return Err(Error::Limit { what, needed: size, allowed, limit: "max_buffer_size" });
        }
        Ok(size)
    }

    fn filled(&self, label: &str, size: u64, usage: wgpu::BufferUsages, bytes: &[u8]) -> Result<wgpu::Buffer> {
        let device = &self.0.device;
        scoped(device, label, || {
            let buffer = device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size,
                usage,
                mapped_at_creation: true,
            });
            // What no scope was told of and is not mapped either is a lost device's.
            buffer
                .get_mapped_range_mut(..)
                .map_err(|error| Error::lost(label, error))?
                .slice(..bytes.len())
                .copy_from_slice(bytes);
            buffer.unmap();
            Ok(buffer)
        })?
    }

    fn known_pipelines(&self) -> MutexGuard<'_, HashMap<PipelineKey, Arc<Pipeline>>> {
        self.0.pipelines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pipelines of these dispatches, in their order; those that are new are compiled at once, on as many threads as
    /// the machine has.
    fn pipelines(&self, dispatches: &[Dispatch]) -> Result<Vec<Arc<Pipeline>>> {
        let mut missing: Vec<&Dispatch> = Vec::new();
        {
            let known = self.known_pipelines();
            for dispatch in dispatches {
                let listed = missing.iter().any(|other| other.key == dispatch.key);
                if !listed && !known.contains_key(&dispatch.key) {
                    missing.push(dispatch);
                }
            }
        }
        let compiled = self.compile_all(&missing)?;
        if !compiled.is_empty() {
            alive(&self.0.device, "compiling")?;
        }
        for (dispatch, pipeline) in missing.iter().zip(compiled) {
            // Compiled outside of the lock: two threads may both compile a kernel, neither waits for another's.
            self.known_pipelines().entry(dispatch.key.clone()).or_insert(pipeline);
        }
        let known = self.known_pipelines();
        let of = |dispatch: &Dispatch| {
            known.get(&dispatch.key).cloned().ok_or_else(|| Error::problem(dispatch.spec.name, "was not compiled"))
        };
        dispatches.iter().map(of).collect()
    }

    #[cfg(target_arch = "wasm32")]
    fn compile_all(&self, missing: &[&Dispatch]) -> Result<Vec<Arc<Pipeline>>> {
        missing.iter().map(|dispatch| self.pipeline(dispatch)).collect()
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn compile_all(&self, missing: &[&Dispatch]) -> Result<Vec<Arc<Pipeline>>> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(missing.len());
        if threads < 2 {
            return missing.iter().map(|dispatch| self.pipeline(dispatch)).collect();
        }
        // Kernels differ in what they cost to compile: each thread takes the next one that nobody has.
        let next = AtomicUsize::new(0);
        let work = || {
            let take = || missing.get(next.fetch_add(1, Ordering::Relaxed));
            std::iter::from_fn(take).map(|dispatch| (dispatch.key.clone(), self.pipeline(dispatch))).collect::<Vec<_>>()
        };
        let mut compiled: HashMap<PipelineKey, Result<Arc<Pipeline>>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let own = work();
            workers.into_iter().filter_map(|worker| worker.join().ok()).flatten().chain(own).collect()
        });
        let of = |dispatch: &&Dispatch| {
            let lost = || Err(Error::problem(dispatch.spec.name, "the thread that compiled it ended early"));
            compiled.remove(&dispatch.key).unwrap_or_else(lost)
        };
        missing.iter().map(of).collect()
    }

    /// Compiles with the driver's cache, and without it when that is refused: one of another device or driver poisons
    /// every pipeline that is made with it.
    fn pipeline(&self, dispatch: &Dispatch) -> Result<Arc<Pipeline>> {
        let (spec, overrides) = (dispatch.spec, &dispatch.overrides);
        let pipeline = match &self.0.pipeline_cache {
            None => self.compile(spec, overrides, None)?,
            Some(cache) => self.compile(spec, overrides, Some(cache)).or_else(|error| {
                tracing::warn!(kernel = spec.name, %error, "compiling without the pipeline cache");
                self.compile(spec, overrides, None)
            })?,
        };
        Ok(Arc::new(pipeline))
    }

    fn compile(
        &self,
        spec: &'static Spec,
        overrides: &[(&'static str, f64)],
        cache: Option<&wgpu::PipelineCache>,
    ) -> Result<Pipeline> {
        let device = &self.0.device;
        let label = format!("egmla.{}", spec.name);
        tracing::debug!(kernel = spec.name, ?overrides, "compiling");
        scoped(device, &label, || {
            let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: Some(&label),
                source: wgpu::ShaderSource::Wgsl(spec.source.into()),
            });
            let entries: Vec<_> = (0..)
                .zip(spec.bindings)
                .map(|(number, binding)| wgpu::BindGroupLayoutEntry {
                    binding: number,
                    visibility: wgpu::ShaderStages::COMPUTE,
                    ty: wgpu::BindingType::Buffer {
                        ty: match binding.access {
                            Access::Params => wgpu::BufferBindingType::Uniform,
                            Access::Read => wgpu::BufferBindingType::Storage { read_only: true },
                            Access::ReadWrite => wgpu::BufferBindingType::Storage { read_only: false },
                        },
                        has_dynamic_offset: false,
                        min_binding_size: None,
                    },
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
                    // Every kernel writes its workgroup memory before it reads it.
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

/// Runs `create` and turns what wgpu has to say about it into an error value.
///
/// On native backends the answer is there at once. In a browser it comes later, to the page's own error handler.
pub(crate) fn scoped<T>(device: &wgpu::Device, what: &str, create: impl FnOnce() -> T) -> Result<T> {
    let scopes = [wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::OutOfMemory]
        .map(|filter| device.push_error_scope(filter));
    let created = create();
    // The last pushed is popped first. Without memory there is no object, and validation complains of it: the cause comes first.
    let errors: Vec<_> = scopes.into_iter().rev().map(|scope| ready(scope.pop()).flatten()).collect();
    match errors.into_iter().flatten().next() {
        None => Ok(created),
        // Of a lost device wgpu says nothing, and then refuses what was not made on it.
        Some(error @ wgpu::Error::Validation { .. }) => {
            Err(alive(device, what).err().unwrap_or(Error::wgpu(what, &error)))
        }
        Some(error) => Err(Error::wgpu(what, &error)),
    }
}

/// Fails on a lost device, where creating, submitting and polling report success. Only what maps a buffer tells: here one that
/// wgpu maps at its creation, as [`Kernels::upload`] does. In a browser that succeeds, too: there the page's own promise tells.
///
/// # Errors
/// [`Error::DeviceLost`]; [`Error::OutOfMemory`] where there is no room for 4 bytes.
pub(crate) fn alive(device: &wgpu::Device, what: &str) -> Result<()> {
    let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let probe = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("egmla.alive"),
        size: 4,
        // Mapped itself: no second buffer stands in for it.
        usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: true,
    });
    if let Some(error) = ready(memory.pop()).flatten() {
        return Err(Error::wgpu(what, &error));
    }
    probe.get_mapped_range_mut(..).map(drop).map_err(|error| Error::lost(what, error))
}

fn ready<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// Whether two devices that compare as equal are one. Natively wgpu compares their numbers, which begin anew in every instance: an
/// error on the one that the other's scope catches tells.
fn one_device(a: &wgpu::Device, b: &wgpu::Device) -> bool {
    if cfg!(target_arch = "wasm32") {
        return true;
    }
    let outer = a.push_error_scope(wgpu::ErrorFilter::Validation);
    let inner = b.push_error_scope(wgpu::ErrorFilter::Validation);
    // Refused before anything is done: a buffer of no use.
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

/// A buffer handed to a kernel, and the bytes of it that the problem touches.
pub(crate) struct Bound<'a> {
    pub region: &'a Region,
    pub bytes: u64,
}

impl Bound<'_> {
    /// Bytes to bind: whole words. Of a region that is not touched, 16, since a binding holds one element at least.
    fn binding_size(&self) -> u64 {
        if self.bytes == 0 { self.region.size.clamp(4, 16) } else { padded(self.bytes, 4) }
    }
}

#[derive(Debug)]
struct Dispatch {
    spec: &'static Spec,
    overrides: Vec<(&'static str, f64)>,
    key: PipelineKey,
    /// Buffer, offset, bytes; by binding number, params left out.
    regions: Vec<(wgpu::Buffer, u64, u64)>,
    params_offset: u64,
    params_size: u64,
    grid: [u32; 3],
}

/// A dispatch as it was recorded, for those who write it down instead of running it.
pub(crate) struct Dispatched<'a> {
    pub spec: &'static Spec,
    pub overrides: &'a [(&'static str, f64)],
    pub params: &'a [u8],
    /// Buffer, offset, bytes; by binding number, params left out.
    pub regions: &'a [(wgpu::Buffer, u64, u64)],
    pub grid: [u32; 3],
}

/// Dispatches that are checked and ready to be written into a pass, with their parameters in one buffer.
///
/// One step, one recording: what it holds is written again by every [`Recording::record`] until [`Recording::clear`].
#[derive(Debug)]
pub struct Recording {
    kernels: Kernels,
    dispatches: Vec<Dispatch>,
    params: Vec<u8>,
    /// What was recorded once for several layers, and before which dispatch.
    once: Vec<((u64, u64), usize)>,
}

/// A place in a [`Recording`] to go back to.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    dispatches: usize,
    params: usize,
}

impl Recording {
    /// An empty recording.
    pub fn new(kernels: &Kernels) -> Self {
        Recording { kernels: kernels.clone(), dispatches: Vec::new(), params: Vec::new(), once: Vec::new() }
    }

    /// The kernels that it records with.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// How many dispatches it holds.
    pub fn dispatches(&self) -> usize {
        self.dispatches.len()
    }

    /// Stem of each dispatch's kernel, in order.
    pub fn kernel_names(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.dispatches.iter().map(|dispatch| dispatch.spec.name)
    }

    /// Every dispatch, in order.
    pub(crate) fn dispatched(&self) -> impl Iterator<Item = Dispatched<'_>> {
        self.dispatches.iter().map(|dispatch| {
            let Dispatch { spec, overrides, regions, grid, .. } = dispatch;
            let params = &self.params[dispatch.params_offset as usize..][..dispatch.params_size as usize];
            Dispatched { spec, overrides, params, regions, grid: *grid }
        })
    }

    /// The present end.
    pub fn mark(&self) -> Mark {
        Mark { dispatches: self.dispatches.len(), params: self.params.len() }
    }

    /// Drops what was added since `mark`.
    pub fn rewind(&mut self, mark: Mark) {
        self.dispatches.truncate(mark.dispatches);
        self.params.truncate(mark.params);
        self.once.retain(|(_, at)| *at < mark.dispatches);
    }

    /// Whether what `key` stands for is still to be recorded, now: the next call says no, until it is rewound or cleared.
    pub(crate) fn once(&mut self, key: (u64, u64)) -> bool {
        let first = self.once.iter().all(|(known, _)| *known != key);
        if first {
            self.once.push((key, self.dispatches.len()));
        }
        first
    }

    /// Drops every dispatch, for the next step.
    pub fn clear(&mut self) {
        self.dispatches.clear();
        self.params.clear();
        self.once.clear();
    }

    /// Adds a dispatch. `bound` are the storage bindings in the order of their numbers.
    pub(crate) fn push<P: bytemuck::Pod>(
        &mut self,
        spec: &'static Spec,
        plan: &Plan,
        params: &P,
        bound: &[Bound<'_>],
    ) -> Result<()> {
        if plan.grid.contains(&0) {
            return Ok(());
        }
        debug_assert_eq!(bound.len() + 1, spec.bindings.len(), "{}", spec.name);
        debug_assert_eq!(size_of::<P>(), spec.params_size, "{}", spec.name);
        if let Some(features) = spec.missing(&self.kernels.0.context) {
            return Err(Error::Feature { kernel: spec.name, features });
        }
        let limits = &self.kernels.0.context.limits;
        let named: Vec<_> = spec.bindings[1..].iter().zip(bound).collect();
        for (binding, given) in &named {
            check_region(spec.name, binding.name, given, limits)?;
        }
        for (index, (first, given)) in named.iter().enumerate() {
            for (second, other) in &named[index + 1..] {
                let written = first.access == Access::ReadWrite || second.access == Access::ReadWrite;
                if written && given.region.buffer == other.region.buffer {
                    return Err(Error::Aliased { kernel: spec.name, first: first.name, second: second.name });
                }
            }
        }
        let alignment = limits.min_uniform_buffer_offset_alignment as usize;
        let params_offset = self.params.len().next_multiple_of(alignment);
        self.params.resize(params_offset, 0);
        self.params.extend_from_slice(bytemuck::bytes_of(params));
        self.dispatches.push(Dispatch {
            spec,
            overrides: plan.overrides.clone(),
            key: (spec.name, plan.overrides.iter().map(|&(name, value)| (name, value.to_bits())).collect()),
            regions: bound
                .iter()
                .map(|given| (given.region.buffer.clone(), given.region.offset, given.binding_size()))
                .collect(),
            params_offset: params_offset as u64,
            params_size: size_of::<P>() as u64,
            grid: plan.grid,
        });
        Ok(())
    }

    /// Keeps the dispatches of one kernel only: to measure it on the buffers of a whole step.
    pub fn retain(&mut self, kernel: &str) {
        self.dispatches.retain(|dispatch| dispatch.spec.name == kernel);
    }

    /// Compiles what is not compiled yet, in parallel, and waits for it. [`Recording::record`] does the same: calling this
    /// before, from a thread that may wait, keeps a first step quick.
    ///
    /// # Errors
    /// [`Error::Validation`] or [`Error::Device`] when the device refuses a kernel, [`Error::DeviceLost`] when it is lost.
    pub fn compile(&self) -> Result<()> {
        self.kernels.pipelines(&self.dispatches).map(drop)
    }

    /// Writes the dispatches into the caller's pass. The caller submits.
    ///
    /// # Errors
    /// [`Error::DeviceLost`], [`Error::OutOfMemory`], [`Error::Validation`] where wgpu refuses a kernel or a buffer of another
    /// device, [`Error::Device`] where the driver fails. The pass is then unchanged.
    pub fn record(&self, pass: &mut wgpu::ComputePass<'_>) -> Result<()> {
        if self.dispatches.is_empty() {
            return Ok(());
        }
        let device = self.kernels.device();
        let pipelines = self.kernels.pipelines(&self.dispatches)?;
        let size = (self.params.len() as u64).next_multiple_of(16);
        let params = self.kernels.filled("egmla.params", size, wgpu::BufferUsages::UNIFORM, &self.params)?;
        let groups = scoped(device, "bind groups", || {
            let both = self.dispatches.iter().zip(&pipelines);
            both.map(|(dispatch, pipeline)| bind(device, &params, dispatch, pipeline)).collect::<Vec<_>>()
        })?;
        for ((dispatch, pipeline), group) in self.dispatches.iter().zip(&pipelines).zip(&groups) {
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, group, &[]);
            pass.dispatch_workgroups(dispatch.grid[0], dispatch.grid[1], dispatch.grid[2]);
        }
        Ok(())
    }

    /// Writes the dispatches into a compute pass of their own in the caller's encoder.
    ///
    /// # Errors
    /// As [`Recording::record`].
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        let descriptor = wgpu::ComputePassDescriptor { label: Some("egmla"), timestamp_writes: None };
        self.record(&mut encoder.begin_compute_pass(&descriptor))
    }
}

fn check_region(kernel: &'static str, binding: &'static str, given: &Bound<'_>, limits: &wgpu::Limits) -> Result<()> {
    let Region { buffer, offset, size } = given.region;
    let alignment = u64::from(limits.min_storage_buffer_offset_alignment);
    if !offset.is_multiple_of(alignment) {
        return Err(Error::BufferOffset { kernel, binding, offset: *offset, alignment });
    }
    let found = buffer.size().saturating_sub(*offset).min(*size);
    let needed = given.binding_size();
    if needed > found {
        return Err(Error::BufferSize { kernel, binding, needed, found });
    }
    if needed > limits.max_storage_buffer_binding_size {
        return Err(Error::Limit {
            what: format!("{kernel}: binding `{binding}`"),
            needed,
            allowed: limits.max_storage_buffer_binding_size,
            limit: "max_storage_buffer_binding_size",
        });
    }
    Ok(())
}

fn bind(device: &wgpu::Device, params: &wgpu::Buffer, dispatch: &Dispatch, pipeline: &Pipeline) -> wgpu::BindGroup {
    let binding = |buffer, offset, size| {
        wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size: wgpu::BufferSize::new(size) })
    };
    let storage = dispatch.regions.iter().map(|(buffer, offset, size)| binding(buffer, *offset, *size));
    let entries: Vec<_> = (0..)
        .zip(std::iter::once(binding(params, dispatch.params_offset, dispatch.params_size)).chain(storage))
        .map(|(number, resource)| wgpu::BindGroupEntry { binding: number, resource })
        .collect();
    device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some(dispatch.spec.name),
        layout: &pipeline.layout,
        entries: &entries,
    })
}
