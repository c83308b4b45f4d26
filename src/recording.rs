//! A recording checks dispatches as they are added and writes them into a compute pass of the caller. Nothing here submits, polls
//! or maps for reading; a call that fails records nothing.
//!
//! Steps of one shape are recorded over and over. A recording remembers its dispatches: one that returns unchanged in the same
//! place is neither planned nor bound again. One uniform buffer holds the parameters, one slot per dispatch; tables hold a step's
//! other data. The queue writes both when the recording goes into a pass. Commands read these buffers when they run, so a
//! cleared recording leaves them alone until the work is done and uses another set: a frame is one such set.

use std::any::Any;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::adapter::Tuning;
use crate::cost::Cost;
use crate::device::{Kernels, Pipeline, Region, Shader};
use crate::error::{BufferError, Error, KernelError, Result};
use crate::op::{Access, Binding, Buffers, MAX_BINDINGS, Op, Spec, Uniform, Variant, choose};
use crate::plan::Plan;
use crate::storage::padded;
use crate::vouched::{Caller, listed, vouches};

/// A dispatch and its objects on the device.
#[derive(Debug)]
struct Dispatch {
    /// The operation, of any type, its cost, and the forced setting.
    op: Box<dyn Any + Send + Sync>,
    cost: fn(&dyn Any) -> Cost,
    forced: Option<(&'static str, Tuning)>,
    caller: Caller,
    spec: &'static Spec,
    shader: Arc<Shader>,
    given: Given,
    params: Vec<u8>,
    grid: [u32; 3],
    pipeline: Option<Arc<Pipeline>>,
    group: Option<wgpu::BindGroup>,
    /// The uniform buffer holds its parameters.
    written: bool,
}

/// A recorded dispatch, for hosts that export it instead of running it.
#[cfg(feature = "check")]
pub(crate) struct Dispatched<'a> {
    pub spec: &'static Spec,
    pub bindings: &'static [Binding],
    pub overrides: &'a [(&'static str, f64)],
    pub params: &'a [u8],
    /// Buffer, offset, bytes; by binding number, without params.
    pub regions: Vec<(wgpu::Buffer, u64, u64)>,
    pub grid: [u32; 3],
}

/// A buffer of tables.
#[derive(Debug)]
struct Chunk {
    buffer: wgpu::Buffer,
    /// Bytes on the host; the buffer has the same, except `unwritten`.
    bytes: Vec<u8>,
    used: usize,
    unwritten: Range<usize>,
}

/// The regions of a dispatch by binding number, without params; `None` for those that its operation does not touch.
type Given = [Option<Region>; MAX_BINDINGS];

/// A bind group and the objects that it binds.
#[derive(Debug)]
struct Group {
    pipeline: Arc<Pipeline>,
    given: Given,
    group: wgpu::BindGroup,
}

/// Dispatches and the buffers that they read.
#[derive(Debug, Default)]
struct Frame {
    /// The first `len` of the recording are current, the others of an earlier step.
    dispatches: Vec<Dispatch>,
    params: Option<wgpu::Buffer>,
    /// By a hash of the objects that they bind.
    groups: HashMap<u64, Vec<Group>>,
    chunks: Vec<Chunk>,
    /// Most bytes of tables in a step so far.
    most_tables: u64,
    /// Shared with commands that have not run yet.
    in_flight: Arc<()>,
    /// Dispatches that such commands may contain.
    in_commands: usize,
    /// Bytes of the uniform buffer.
    scratch: Vec<u8>,
}

impl Frame {
    fn is_free(&self) -> bool {
        Arc::strong_count(&self.in_flight) == 1
    }
}

/// Checked dispatches, ready for a pass, with their parameters in one buffer.
///
/// One step, one recording: every [`Recording::record`] writes the dispatches again, until [`Recording::clear`]. A recording
/// keeps bind groups and buffers for the next step of the same shape: drop it to release them.
#[derive(Debug)]
pub struct Recording {
    kernels: Kernels,
    frame: Frame,
    parked: Vec<Frame>,
    /// Dispatches recorded.
    len: usize,
    /// Keys of work that several layers share, and the dispatch that each precedes.
    once: Vec<((u64, u64), usize)>,
    /// Flags to set when the work is done, and the dispatch that each follows.
    done: Vec<(Arc<AtomicBool>, usize)>,
    /// Regions of tables.
    tables: Vec<((u64, u64), Region)>,
}

/// A place in a [`Recording`] to go back to.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    dispatches: usize,
}

/// From one dispatch's parameters to the next: a multiple of every device's uniform offset alignment.
const SLOT: u64 = 256;

/// Bytes of a table buffer are a multiple of this.
const LEAST_CHUNK: u64 = 16 << 10;

impl Recording {
    /// An empty recording.
    pub fn new(kernels: &Kernels) -> Self {
        let (frame, parked, once, done, tables) = Default::default();
        Recording { kernels: kernels.clone(), frame, parked, len: 0, once, done, tables }
    }

    /// The kernels of its device.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// Number of dispatches.
    pub fn dispatches(&self) -> usize {
        self.len
    }

    fn recorded(&self) -> &[Dispatch] {
        &self.frame.dispatches[..self.len]
    }

    /// Stem of each dispatch's kernel, in order.
    pub fn kernel_names(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.recorded().iter().map(|dispatch| dispatch.spec.name)
    }

    /// Stems of the dispatches whose loops and indices wgpu checks although natively it need not: the library does not vouch for
    /// them.
    pub fn checked_kernels(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.recorded().iter().filter(|dispatch| !dispatch.shader.vouched).map(|dispatch| dispatch.spec.name)
    }

    /// Kernel, workgroups, and FLOPs and bytes of every dispatch, in order.
    pub fn costs(&self) -> impl Iterator<Item = (&'static str, [u32; 3], Cost)> + '_ {
        self.recorded().iter().map(|dispatch| (dispatch.spec.name, dispatch.grid, (dispatch.cost)(&*dispatch.op)))
    }

    /// Every dispatch, in order.
    #[cfg(feature = "check")]
    pub(crate) fn dispatched(&self) -> impl Iterator<Item = Dispatched<'_>> {
        self.recorded().iter().map(|dispatch| {
            let Dispatch { spec, shader, params, grid, .. } = dispatch;
            let Shader { bindings, overrides, .. } = &**shader;
            Dispatched { spec, bindings, overrides, params, regions: self.bound(dispatch), grid: *grid }
        })
    }

    /// The present end.
    pub fn mark(&self) -> Mark {
        Mark { dispatches: self.len }
    }

    /// Drops the dispatches since `mark`.
    pub fn rewind(&mut self, mark: Mark) {
        self.len = self.len.min(mark.dispatches);
        self.once.retain(|(_, at)| *at < mark.dispatches);
        self.done.retain(|(_, at)| *at <= mark.dispatches);
    }

    /// True the first time `key` is seen since the last clear, or since a rewind to before it.
    pub(crate) fn once(&mut self, key: (u64, u64)) -> bool {
        let first = self.once.iter().all(|(known, _)| *known != key);
        if first {
            self.once.push((key, self.len));
        }
        first
    }

    /// Sets `done` when the work of a recording with the present dispatches is done.
    pub(crate) fn on_done(&mut self, done: &Arc<AtomicBool>) {
        self.done.push((Arc::clone(done), self.len));
    }

    /// Drops every dispatch, for the next step.
    pub fn clear(&mut self) {
        self.len = 0;
        self.done.clear();
        self.once.clear();
        self.tables.clear();
        if !self.frame.is_free() {
            let free = self.parked.iter().position(Frame::is_free);
            let next = free.map(|index| self.parked.swap_remove(index)).unwrap_or_default();
            self.parked.push(std::mem::replace(&mut self.frame, next));
        }
        self.frame.in_commands = 0;
        // Several chunks become one the next time.
        if self.frame.chunks.len() > 1 {
            self.frame.most_tables = self.frame.chunks.iter().map(|chunk| chunk.bytes.len() as u64).sum();
            self.frame.chunks.clear();
        }
        self.frame.chunks.iter_mut().for_each(|chunk| chunk.used = 0);
    }

    /// The region of the table `key` in the recording's storage buffer, written on the first call and valid until
    /// [`Recording::clear`].
    ///
    /// # Errors
    /// As [`Kernels::allocate`].
    pub(crate) fn table(&mut self, key: (u64, u64), bytes: &[u8]) -> Result<Region> {
        if let Some((_, region)) = self.tables.iter().find(|(known, _)| *known == key) {
            return Ok(region.clone());
        }
        let region = self.place(bytes)?;
        self.tables.push((key, region.clone()));
        Ok(region)
    }

    fn place(&mut self, table: &[u8]) -> Result<Region> {
        let alignment = self.kernels.context().limits.min_storage_buffer_offset_alignment as usize;
        let Frame { chunks, most_tables, .. } = &mut self.frame;
        let fits = |chunk: &Chunk| chunk.used.next_multiple_of(alignment) + table.len() <= chunk.bytes.len();
        if !chunks.last().is_some_and(fits) {
            let size = padded((table.len() as u64).max(*most_tables).max(1), LEAST_CHUNK);
            let buffer = self.kernels.allocate("egmla.tables", size)?;
            chunks.push(Chunk { buffer, bytes: vec![0; size as usize], used: 0, unwritten: 0..0 });
        }
        let Some(chunk) = chunks.last_mut() else { return Ok(self.kernels.absent()) };
        let first = chunk.used.next_multiple_of(alignment);
        let range = first..first + table.len();
        chunk.used = range.end;
        if chunk.bytes[range.clone()] != *table {
            chunk.bytes[range.clone()].copy_from_slice(table);
            chunk.unwritten = match chunk.unwritten.is_empty() {
                true => range,
                false => chunk.unwritten.start.min(range.start)..chunk.unwritten.end.max(range.end),
            };
        }
        Ok(Region::new(&chunk.buffer, first as u64, table.len() as u64))
    }

    /// Adds an operation, with the shader that [`choose`] picks for it.
    ///
    /// # Errors
    /// A plan that is refused, a region that is too small or misaligned, or one buffer both read and written. The recording is
    /// then unchanged.
    pub fn add<O: Op>(&mut self, op: &O, args: O::Args<&Region>) -> Result<()> {
        self.add_chosen(op, args, Caller::Application)
    }

    /// The same for the library, whose tables hold what they should.
    pub(crate) fn add_own<O: Op>(&mut self, op: &O, args: O::Args<&Region>) -> Result<()> {
        self.add_chosen(op, args, Caller::Library)
    }

    fn add_chosen<O: Op>(&mut self, op: &O, args: O::Args<&Region>, caller: Caller) -> Result<()> {
        if self.repeats(op, None, args, caller) {
            return Ok(());
        }
        let (variant, plan) = choose(op, self.kernels.context())?;
        self.push((variant, vouches::<O>(caller)), op, None, caller, plan, args)
    }

    /// Adds an operation with one of its shaders, at one of its settings.
    ///
    /// # Errors
    /// As [`Recording::add`], and `KernelError::Feature` if the device lacks a feature of the shader.
    pub fn add_variant<O: Op>(
        &mut self,
        variant: &'static Variant<O>,
        op: &O,
        args: O::Args<&Region>,
        tuning: Tuning,
    ) -> Result<()> {
        self.add_forced(variant, op, args, tuning, Caller::Application)
    }

    /// The same for the library's own checks and benches.
    pub(crate) fn add_forced<O: Op>(
        &mut self,
        variant: &'static Variant<O>,
        op: &O,
        args: O::Args<&Region>,
        tuning: Tuning,
        caller: Caller,
    ) -> Result<()> {
        let forced = Some((variant.spec.name, tuning));
        if self.repeats(op, forced, args, caller) {
            return Ok(());
        }
        let (variant, is_vouched) = match listed(variant) {
            Some(listed) => (listed, vouches::<O>(caller)),
            None => (variant, false),
        };
        let context = self.kernels.context();
        let plan = variant.plan(op, context, tuning)?;
        if let Some(why) = context.left_out.0.get(variant.spec.name) {
            return Err(Error::problem(variant.spec.name, format!("left out on this device: {why}")));
        }
        if let Some(features) = variant.spec.missing(context) {
            return Err(Error::Kernel(KernelError::Feature { kernel: variant.spec.name, features }));
        }
        self.push((variant, is_vouched), op, forced, caller, plan, args)
    }

    /// Reuses the previous dispatch at this place if it is the one to add; returns whether it was.
    fn repeats<O: Op>(
        &mut self,
        op: &O,
        forced: Option<(&'static str, Tuning)>,
        args: O::Args<&Region>,
        caller: Caller,
    ) -> bool {
        let Some(known) = self.frame.dispatches.get(self.len) else { return false };
        let mut same = known.caller == caller && known.forced == forced && known.op.downcast_ref() == Some(op);
        if same {
            // A binding left out before is left out now.
            let is_known =
                |index: usize, region: &Region| known.given[index].as_ref().is_none_or(|given| given == region);
            args.each(&mut |index, region| same &= is_known(index, region));
        }
        self.len += usize::from(same);
        same
    }

    fn push<O: Op>(
        &mut self,
        (variant, is_vouched): (&'static Variant<O>, bool),
        op: &O,
        forced: Option<(&'static str, Tuning)>,
        caller: Caller,
        plan: Plan,
        args: O::Args<&Region>,
    ) -> Result<()> {
        let spec = &variant.spec;
        if plan.grid.contains(&0) {
            return Ok(());
        }
        let bindings = <O::Args<u64> as Buffers<u64>>::BINDINGS;
        const {
            assert!(<O::Args<u64> as Buffers<u64>>::BINDINGS.len() <= MAX_BINDINGS);
            assert!(4 * <O::Params as Uniform>::FIELDS.len() as u64 <= SLOT);
        };
        let mut bytes = [0; MAX_BINDINGS];
        op.bytes().each(&mut |index, of_binding| bytes[index] = of_binding);
        let mut given: Given = Default::default();
        args.each(&mut |index, region| given[index] = (bytes[index] > 0).then(|| region.clone()));
        check_given(spec.name, bindings, &given, &bytes, &self.kernels.context().limits)?;
        let mut params = Vec::new();
        op.params(&plan).write(&mut params);
        let shader = Shader::new(spec, bindings, plan.overrides, is_vouched);
        let (shader, pipeline, group) = match self.frame.dispatches.get(self.len) {
            Some(known) if known.shader.key == shader.key => {
                let group = known.group.clone().filter(|_| known.given == given);
                (known.shader.clone(), known.pipeline.clone(), group)
            }
            _ => (Arc::new(shader), None, None),
        };
        let cost = |op: &dyn Any| op.downcast_ref().map_or(Cost::default(), O::cost);
        let op = Box::new(*op);
        let (grid, written) = (plan.grid, false);
        let dispatch =
            Dispatch { op, cost, forced, caller, spec, shader, given, params, grid, pipeline, group, written };
        match self.frame.dispatches.get_mut(self.len) {
            Some(known) => *known = dispatch,
            None => self.frame.dispatches.push(dispatch),
        }
        self.len += 1;
        Ok(())
    }

    /// The bound ranges: as much of a region as a binding holds, so that one bind group serves every size of a problem. An absent
    /// buffer binds none of the caller's.
    fn bound(&self, dispatch: &Dispatch) -> Vec<(wgpu::Buffer, u64, u64)> {
        let largest = self.kernels.context().limits.max_storage_buffer_binding_size;
        let bound = |(index, binding): (usize, &Binding)| {
            let Region { buffer, offset, size } = match (&dispatch.given[index], binding.access) {
                (Some(given), _) => given.clone(),
                (None, Access::Read) => self.kernels.absent(),
                (None, Access::Write) => self.kernels.sink(index),
            };
            let size = buffer.size().saturating_sub(offset).min(size).min(largest) & !3;
            (buffer, offset, size)
        };
        dispatch.shader.bindings.iter().enumerate().map(bound).collect()
    }

    /// Keeps the dispatches of one kernel only: to measure it on the buffers of a whole step.
    pub fn retain(&mut self, kernel: &str) {
        self.frame.dispatches.truncate(self.len);
        self.frame.dispatches.retain(|dispatch| dispatch.spec.name == kernel);
        self.frame.dispatches.iter_mut().for_each(|dispatch| dispatch.written = false);
        self.len = self.frame.dispatches.len();
    }

    /// Compiles the missing pipelines in parallel and waits for them, as [`Recording::record`] would. Call it ahead, from a
    /// thread that may wait, to keep a first step quick.
    ///
    /// # Errors
    /// `DeviceError::Validation` or `DeviceError::Driver` when the device refuses a kernel, `DeviceError::Lost` when it is lost.
    pub fn compile(&mut self) -> Result<()> {
        let missing = |dispatch: &&mut Dispatch| dispatch.pipeline.is_none();
        let mut missing: Vec<_> = self.frame.dispatches[..self.len].iter_mut().filter(missing).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let pipelines = self.kernels.pipelines(missing.iter().map(|dispatch| &*dispatch.shader))?;
        for (dispatch, pipeline) in missing.iter_mut().zip(pipelines) {
            dispatch.pipeline = Some(pipeline);
        }
        Ok(())
    }

    /// Writes the dispatches into the caller's pass, and their parameters through the caller's queue. The caller submits.
    ///
    /// # Errors
    /// `DeviceError::Lost`, `DeviceError::OutOfMemory`; `DeviceError::Validation` if wgpu refuses a kernel or a buffer of another
    /// device, `DeviceError::Driver` if the driver fails. The pass is then unchanged. A step of a known shape makes no call that
    /// detects a lost device: reading results back reports it.
    pub fn record(&mut self, pass: &mut wgpu::ComputePass<'_>) -> Result<()> {
        if self.len == 0 {
            return Ok(());
        }
        self.record_some(pass, 0..self.len)
    }

    /// The same for some of the dispatches.
    pub(crate) fn record_some(&mut self, pass: &mut wgpu::ComputePass<'_>, range: Range<usize>) -> Result<()> {
        self.compile()?;
        self.make()?;
        self.write();
        for (index, dispatch) in self.frame.dispatches[..self.len].iter().enumerate() {
            if !range.contains(&index) {
                continue;
            }
            let (Some(pipeline), Some(group)) = (&dispatch.pipeline, &dispatch.group) else { continue };
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, group, &[(index as u64 * SLOT) as u32]);
            pass.dispatch_workgroups(dispatch.grid[0], dispatch.grid[1], dispatch.grid[2]);
        }
        let in_flight = Arc::clone(&self.frame.in_flight);
        let done: Vec<_> = self.done.iter().map(|(done, _)| Arc::clone(done)).collect();
        // The callback is dropped without a call if the commands are never submitted.
        pass.on_submitted_work_done(move || {
            done.iter().for_each(|done| done.store(true, Ordering::Release));
            drop(in_flight);
        });
        self.frame.in_commands = self.frame.in_commands.max(self.len);
        Ok(())
    }

    /// Makes the missing uniform buffer and bind groups.
    fn make(&mut self) -> Result<()> {
        let (device, watched) = (self.kernels.device(), self.kernels.watched());
        let frame = &mut self.frame;
        let size = SLOT * self.len as u64;
        // Commands may still read the old buffer: they keep it.
        let changed = frame.dispatches[..self.len].iter().position(|dispatch| !dispatch.written);
        let shared = changed.is_some_and(|first| first < frame.in_commands) && !frame.is_free();
        if shared || frame.params.as_ref().is_none_or(|params| params.size() < size) {
            let size = size.next_power_of_two();
            let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
            let params = self.kernels.buffer("egmla.params", size, usage)?;
            frame.params = Some(params);
            frame.in_commands = 0;
            frame.groups.clear();
            for dispatch in &mut frame.dispatches {
                (dispatch.written, dispatch.group) = (false, None);
            }
        }
        let missing: Vec<_> = (0..self.len).filter(|&index| frame.dispatches[index].group.is_none()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        if frame.groups.len() > MOST_GROUPS {
            frame.groups.clear();
        }
        let mut made = false;
        for index in missing {
            let dispatch = &self.frame.dispatches[index];
            let (Some(pipeline), Some(params)) = (&dispatch.pipeline, &self.frame.params) else { continue };
            let key = key_of(pipeline, &dispatch.given);
            let same = |known: &&Group| Arc::ptr_eq(&known.pipeline, pipeline) && known.given == dispatch.given;
            let known = self.frame.groups.get(&key).and_then(|groups| groups.iter().find(same));
            let group = match known {
                Some(known) => known.group.clone(),
                None => {
                    let group = watched.scoped("bind groups", || {
                        bind(device, params, &self.bound(dispatch), dispatch.spec.name, pipeline)
                    })?;
                    let (pipeline, given) = (pipeline.clone(), dispatch.given.clone());
                    made = true;
                    self.frame.groups.entry(key).or_default().push(Group { pipeline, given, group: group.clone() });
                    group
                }
            };
            self.frame.dispatches[index].group = Some(group);
        }
        if made {
            // A lost device fails every call until it is dropped: none of its objects is kept.
            watched.alive("bind groups").inspect_err(|_| {
                self.frame.params = None;
                self.frame.groups.clear();
            })?;
        }
        Ok(())
    }

    /// Writes the parameters and tables that changed.
    pub(crate) fn write(&mut self) {
        let queue = self.kernels.queue();
        let Frame { dispatches, params, chunks, scratch, .. } = &mut self.frame;
        let recorded = &mut dispatches[..self.len];
        let first = recorded.iter().position(|dispatch| !dispatch.written);
        let last = recorded.iter().rposition(|dispatch| !dispatch.written);
        if let (Some(first), Some(last), Some(params)) = (first, last, params) {
            scratch.clear();
            for dispatch in &mut recorded[first..=last] {
                let at = scratch.len();
                scratch.extend_from_slice(&dispatch.params);
                scratch.resize(at + SLOT as usize, 0);
                dispatch.written = true;
            }
            queue.write_buffer(params, first as u64 * SLOT, scratch);
        }
        for chunk in chunks {
            let range = std::mem::take(&mut chunk.unwritten);
            if !range.is_empty() {
                queue.write_buffer(&chunk.buffer, range.start as u64, &chunk.bytes[range]);
            }
        }
    }

    /// Writes the dispatches into a compute pass of their own in the caller's encoder.
    ///
    /// # Errors
    /// As [`Recording::record`].
    pub fn encode(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        let descriptor = wgpu::ComputePassDescriptor { label: Some("egmla"), timestamp_writes: None };
        self.record(&mut encoder.begin_compute_pass(&descriptor))
    }
}

/// Most bind groups of a recording; over it, all are dropped.
const MOST_GROUPS: usize = 1 << 16;

fn key_of(pipeline: &Arc<Pipeline>, given: &Given) -> u64 {
    let mut hasher = DefaultHasher::new();
    (Arc::as_ptr(pipeline) as usize, given).hash(&mut hasher);
    hasher.finish()
}

fn check_given(
    kernel: &'static str,
    bindings: &[Binding],
    given: &Given,
    bytes: &[u64],
    limits: &wgpu::Limits,
) -> Result<()> {
    let touched = || {
        bindings
            .iter()
            .zip(given.iter().zip(bytes))
            .filter_map(|(binding, (given, &bytes))| given.as_ref().map(|region| (binding, region, padded(bytes, 4))))
    };
    for (binding, region, needed) in touched() {
        region.check(kernel, binding.name, needed, limits)?;
    }
    for (index, (first, region, _)) in touched().enumerate() {
        for (second, other, _) in touched().skip(index + 1) {
            let written = first.access == Access::Write || second.access == Access::Write;
            if written && region.buffer == other.buffer {
                return Err(Error::Buffer(BufferError::Aliased { kernel, first: first.name, second: second.name }));
            }
        }
    }
    Ok(())
}

fn bind(
    device: &wgpu::Device,
    params: &wgpu::Buffer,
    bound: &[(wgpu::Buffer, u64, u64)],
    label: &str,
    pipeline: &Pipeline,
) -> wgpu::BindGroup {
    let binding = |buffer, offset, size| {
        wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size: wgpu::BufferSize::new(size) })
    };
    let storage = bound.iter().map(|(buffer, offset, size)| binding(buffer, *offset, *size));
    let entries: Vec<_> = (0..)
        .zip(std::iter::once(binding(params, 0, SLOT)).chain(storage))
        .map(|(number, resource)| wgpu::BindGroupEntry { binding: number, resource })
        .collect();
    device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some(label),
        layout: &pipeline.layout,
        entries: &entries,
    })
}
