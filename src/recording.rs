//! A recording collects dispatches, checked as they are added, and writes them into a compute pass of the caller's: nothing
//! here submits, polls or maps for reading, and a recording that met an error has recorded nothing.

use crate::adapter::Tuning;
use crate::device::{Kernels, Pipeline, Region, Shader, scoped};
use crate::error::{Error, Result};
use crate::op::{Access, Binding, Buffers as _, MAX_BINDINGS, Op, Spec, Uniform as _, Variant, choose};
use crate::plan::Plan;
use crate::storage::padded;

/// A region and the bytes of it that a problem touches.
#[derive(Clone, Copy)]
struct Bound<'a> {
    region: &'a Region,
    bytes: u64,
}

impl Bound<'_> {
    /// Bytes to bind: whole words.
    fn binding_size(&self) -> u64 {
        padded(self.bytes, 4)
    }
}

#[derive(Debug)]
struct Dispatch {
    shader: Shader,
    /// Buffer, offset, bytes; by binding number, params left out.
    regions: Vec<(wgpu::Buffer, u64, u64)>,
    params_offset: u64,
    grid: [u32; 3],
}

/// A dispatch as it was recorded, for those who write it down instead of running it.
pub(crate) struct Dispatched<'a> {
    pub spec: &'static Spec,
    pub bindings: &'static [Binding],
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
        self.dispatches.iter().map(|dispatch| dispatch.shader.spec.name)
    }

    /// Every dispatch, in order.
    pub(crate) fn dispatched(&self) -> impl Iterator<Item = Dispatched<'_>> {
        self.dispatches.iter().map(|dispatch| {
            let Dispatch { shader: Shader { spec, bindings, params_size, overrides, .. }, regions, grid, .. } =
                dispatch;
            let params = &self.params[dispatch.params_offset as usize..][..*params_size as usize];
            Dispatched { spec, bindings, overrides, params, regions, grid: *grid }
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

    /// Adds an operation, with the shader that [`choose`] picks for it.
    ///
    /// # Errors
    /// What the plan refuses, a region that is too small or begins at a wrong offset, or one buffer that is read and written.
    /// The recording is then as it was.
    pub fn add<O: Op>(&mut self, op: &O, args: O::Args<&Region>) -> Result<()> {
        let (variant, plan) = choose(op, self.kernels.context())?;
        self.push(&variant.spec, op, plan, args)
    }

    /// Adds an operation with one of its shaders, at one of its settings.
    ///
    /// # Errors
    /// As [`Recording::add`], and [`Error::Feature`] where the device lacks what the shader needs.
    pub fn add_variant<O: Op>(
        &mut self,
        variant: &'static Variant<O>,
        op: &O,
        args: O::Args<&Region>,
        tuning: Tuning,
    ) -> Result<()> {
        let context = self.kernels.context();
        let plan = variant.plan(op, context, tuning)?;
        if let Some(features) = variant.spec.missing(context) {
            return Err(Error::Feature { kernel: variant.spec.name, features });
        }
        self.push(&variant.spec, op, plan, args)
    }

    fn push<O: Op>(&mut self, spec: &'static Spec, op: &O, plan: Plan, args: O::Args<&Region>) -> Result<()> {
        if plan.grid.contains(&0) {
            return Ok(());
        }
        let bindings = <O::Args<u64> as crate::op::Buffers<u64>>::BINDINGS;
        const { assert!(<O::Args<u64> as crate::op::Buffers<u64>>::BINDINGS.len() <= MAX_BINDINGS) };
        let mut bytes = [0; MAX_BINDINGS];
        op.bytes().each(&mut |index, of_binding| bytes[index] = of_binding);
        let mut bound = Vec::with_capacity(bindings.len());
        args.each(&mut |index, region| bound.push(Bound { region, bytes: bytes[index] }));
        check_bound(spec.name, bindings, &bound, &self.kernels.context().limits)?;
        let limits = &self.kernels.context().limits;
        let params_offset = self.params.len().next_multiple_of(limits.min_uniform_buffer_offset_alignment as usize);
        self.params.resize(params_offset, 0);
        op.params(&plan).write(&mut self.params);
        self.dispatches.push(Dispatch {
            shader: Shader::new(spec, bindings, (self.params.len() - params_offset) as u64, plan.overrides),
            regions: bindings.iter().zip(&bound).enumerate().map(|(index, given)| self.bind(index, given)).collect(),
            params_offset: params_offset as u64,
            grid: plan.grid,
        });
        Ok(())
    }

    /// What is bound to a name. What a problem does not touch is bound to nothing of the caller's.
    fn bind(&self, index: usize, (binding, given): (&Binding, &Bound<'_>)) -> (wgpu::Buffer, u64, u64) {
        let Region { buffer, offset, size } = match (given.bytes, binding.access) {
            (0, Access::Read) => self.kernels.absent(),
            (0, Access::Write) => self.kernels.sink(index),
            _ => Region::new(&given.region.buffer, given.region.offset, given.binding_size()),
        };
        (buffer, offset, size)
    }

    /// Keeps the dispatches of one kernel only: to measure it on the buffers of a whole step.
    pub fn retain(&mut self, kernel: &str) {
        self.dispatches.retain(|dispatch| dispatch.shader.spec.name == kernel);
    }

    /// Compiles what is not compiled yet, in parallel, and waits for it. [`Recording::record`] does the same: calling this
    /// before, from a thread that may wait, keeps a first step quick.
    ///
    /// # Errors
    /// [`Error::Validation`] or [`Error::Device`] when the device refuses a kernel, [`Error::DeviceLost`] when it is lost.
    pub fn compile(&self) -> Result<()> {
        self.kernels.pipelines(self.dispatches.iter().map(|dispatch| &dispatch.shader)).map(drop)
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
        let pipelines = self.kernels.pipelines(self.dispatches.iter().map(|dispatch| &dispatch.shader))?;
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

fn check_bound(kernel: &'static str, bindings: &[Binding], bound: &[Bound<'_>], limits: &wgpu::Limits) -> Result<()> {
    let touched = || bindings.iter().zip(bound).filter(|(_, given)| given.bytes > 0);
    for (binding, given) in touched() {
        check_region(kernel, binding.name, given, limits)?;
    }
    for (index, (first, given)) in touched().enumerate() {
        for (second, other) in touched().skip(index + 1) {
            let written = first.access == Access::Write || second.access == Access::Write;
            if written && given.region.buffer == other.region.buffer {
                return Err(Error::Aliased { kernel, first: first.name, second: second.name });
            }
        }
    }
    Ok(())
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
        .zip(std::iter::once(binding(params, dispatch.params_offset, dispatch.shader.params_size)).chain(storage))
        .map(|(number, resource)| wgpu::BindGroupEntry { binding: number, resource })
        .collect();
    device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some(dispatch.shader.spec.name),
        layout: &pipeline.layout,
        entries: &entries,
    })
}
