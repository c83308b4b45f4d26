//! An operation is a type, a variant is a value.
//!
//! An [`Op`] holds the sizes of one operation and names its buffers, the parameters of its shaders, and its cost. Its
//! [`Variant`]s are its shaders, best first, in one list. [`choose`] is the one place that picks a variant;
//! [`Recording::add`](crate::recording::Recording::add) calls it. An application may add operations of its own.

use std::fmt::Debug;

use crate::adapter::{Cooperative, PlanContext, Tuning};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::plan::{Draft, Plan, check_widths};

/// Access of a shader to a binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// `var<storage, read>`
    Read,
    /// `var<storage, read_write>`
    Write,
}

/// A storage binding. Binding 0 is the uniform `params`; storage bindings follow in the order of their list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// Name of the variable in the shader.
    pub name: &'static str,
    /// Its access.
    pub access: Access,
}

/// Most storage buffers of an operation: WebGPU's default limit.
pub const MAX_BINDINGS: usize = 8;

/// One value per buffer of an operation: its region, or the bytes that it must hold. Declared with [`args!`](crate::args).
pub trait Buffers<T> {
    /// The buffers, inputs first.
    const BINDINGS: &'static [Binding];

    /// One value for all of them.
    fn all(value: T) -> Self
    where
        T: Copy;

    /// Visits the values in the order of their bindings.
    fn each(self, visit: &mut dyn FnMut(usize, T));
}

/// Declares the buffers of an operation once: the struct of arguments, the bindings of its shaders and their order.
///
/// ```
/// egmla::args! {
///     /// Buffers of one dispatch.
///     pub struct Args {
///         /// `[elements]` f32.
///         x: Read,
///         /// `[elements]` f32, written.
///         y: Write,
///     }
/// }
/// ```
#[macro_export]
macro_rules! args {
    ($(#[$meta:meta])* $vis:vis struct $name:ident { $($(#[$of:meta])* $field:ident: $access:ident),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy)]
        $vis struct $name<T> { $($(#[$of])* pub $field: T),* }

        impl<T> $crate::low_level::Buffers<T> for $name<T> {
            const BINDINGS: &'static [$crate::low_level::Binding] = &[
                $($crate::low_level::Binding { name: stringify!($field), access: $crate::low_level::Access::$access }),*
            ];

            fn all(value: T) -> Self
            where
                T: Copy,
            {
                $name { $($field: value),* }
            }

            fn each(self, visit: &mut dyn FnMut(usize, T)) {
                let mut index = 0;
                $(
                    visit(index, self.$field);
                    index += 1;
                )*
                let _ = index;
            }
        }
    };
}

/// The uniform parameters of an operation's shaders: words one after another. Declared with [`params!`](crate::params).
pub trait Uniform: Copy + Debug {
    /// Name and WGSL type of each, in order.
    const FIELDS: &'static [(&'static str, &'static str)];

    /// Appends them as bytes.
    fn write(&self, bytes: &mut Vec<u8>);
}

/// Declares the uniform parameters of an operation's shaders: `u32` and `f32` fields in the order of the WGSL struct.
///
/// ```
/// egmla::params! {
///     /// Uniform parameters, as in the shader.
///     pub struct Params { elements: u32, factor: f32 }
/// }
/// ```
#[macro_export]
macro_rules! params {
    ($(#[$meta:meta])* $vis:vis struct $name:ident { $($(#[$of:meta])* $field:ident: $kind:ident),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy)]
        $vis struct $name { $($(#[$of])* pub(crate) $field: $kind),* }

        impl $crate::low_level::Uniform for $name {
            const FIELDS: &'static [(&'static str, &'static str)] = &[$((stringify!($field), stringify!($kind))),*];

            fn write(&self, bytes: &mut Vec<u8>) {
                $(bytes.extend_from_slice(&self.$field.to_ne_bytes());)*
            }
        }
    };
}

/// An operation: the sizes of one dispatch.
pub trait Op: Copy + Debug + PartialEq + Send + Sync + 'static {
    /// Its buffers; declared with [`args!`](crate::args).
    type Args<T: Copy>: Buffers<T> + Copy;

    /// The parameters of its shaders; declared with [`params!`](crate::params).
    type Params: Uniform;

    /// The stem of its files, labels and bench rows; variants carry it as a prefix.
    const NAME: &'static str;

    /// The shaders that compute it, best first.
    const VARIANTS: &'static [Variant<Self>];

    /// Widths that a shader may loop over element by element. Planning refuses those over
    /// [`MAX_ITERATIONS`](crate::plan::MAX_ITERATIONS); sums and pitches of the others fit 32 bits.
    fn widths(&self) -> [(&'static str, u32); 4] {
        [("", 0); 4]
    }

    /// Refuses problems that no variant can compute.
    ///
    /// # Errors
    /// The reason, with the number.
    fn validate(&self) -> Result<(), String> {
        Ok(())
    }

    /// The parameters of a plan.
    fn params(&self, plan: &Plan) -> Self::Params;

    /// Bytes that each buffer must hold; 0 for an absent one, which binds none of the caller's buffers.
    fn bytes(&self) -> Self::Args<u64>;

    /// FLOPs and bytes, by the rules of [`Cost`].
    fn cost(&self) -> Cost;
}

/// The constants of a shader.
#[derive(Debug, Clone, Copy)]
pub struct Spec {
    /// The stem: `shaders/<name>.wgsl`, label `egmla.<name>`.
    pub name: &'static str,
    /// The file that runs.
    pub source: &'static str,
    /// Number of settings, for `Tuning::Forced`.
    pub tunings: usize,
    /// Features beyond WebGPU's core that the device must have.
    pub features: wgpu::Features,
    /// The fewest invocations per subgroup that it is right for; 0 without subgroup operations.
    pub subgroup: u32,
    /// The cooperative matrices that it computes with.
    pub cooperative: Cooperative,
}

impl Spec {
    /// Whether a device has what it needs.
    pub fn offered(&self, device: &PlanContext) -> bool {
        device.features.contains(self.features)
            && device.subgroup_min_size >= self.subgroup
            && self.cooperative.without(device.cooperative) == Cooperative::NONE
    }

    /// Names of the features that a device lacks for it; `None` when it can run.
    pub fn missing(&self, device: &PlanContext) -> Option<String> {
        // Called before every dispatch: only what is missing is named.
        if self.offered(device) {
            return None;
        }
        let features = self.features - device.features;
        let narrow = device.subgroup_min_size < self.subgroup;
        let subgroup = narrow.then(|| format!("subgroups of {} invocations and more", self.subgroup));
        let matrices = self.cooperative.without(device.cooperative);
        let matrices = matrices.names().into_iter().map(|name| format!("cooperative matrices of {name}"));
        let names = features.iter_names().map(|(name, _)| name.to_lowercase());
        Some(names.chain(subgroup).chain(matrices).collect::<Vec<_>>().join(", "))
    }
}

/// A shader of an operation.
#[derive(Debug, Clone, Copy)]
pub struct Variant<O: 'static> {
    /// Its constants.
    pub spec: Spec,
    /// The setting for the class of adapter, unless one was measured.
    pub auto: fn(&O, &PlanContext) -> usize,
    /// The dispatch of one setting, or why the shader cannot compute it.
    pub draft: fn(&O, &PlanContext, usize) -> Result<Draft, String>,
    /// Whether it is the right one if it can run; the variants are asked in order.
    pub preferred: fn(&O, &PlanContext) -> bool,
    /// The shader's assumptions about every plan; returns the first that a plan breaks.
    pub assumes: fn(&O, &PlanContext, &Plan) -> Result<(), &'static str>,
}

impl<O: Op> Variant<O> {
    /// A shader for WebGPU's core that takes its first setting on every adapter and is always preferred.
    pub const fn new(
        (name, source): (&'static str, &'static str),
        tunings: usize,
        draft: fn(&O, &PlanContext, usize) -> Result<Draft, String>,
        assumes: fn(&O, &PlanContext, &Plan) -> Result<(), &'static str>,
    ) -> Self {
        let spec = Spec {
            name,
            source,
            tunings,
            features: wgpu::Features::empty(),
            subgroup: 0,
            cooperative: Cooperative::NONE,
        };
        Variant { spec, auto: |_, _| 0, draft, preferred: |_, _| true, assumes }
    }

    /// The same with a setting for each class of adapter.
    pub const fn auto(mut self, auto: fn(&O, &PlanContext) -> usize) -> Self {
        self.auto = auto;
        self
    }

    /// The same, preferred only if `preferred` says so.
    pub const fn preferred(mut self, preferred: fn(&O, &PlanContext) -> bool) -> Self {
        self.preferred = preferred;
        self
    }

    /// The same for devices with subgroups of `least` invocations and more.
    pub const fn subgroups(mut self, least: u32) -> Self {
        self.spec.features = wgpu::Features::SUBGROUP;
        self.spec.subgroup = least;
        self
    }

    /// The same for devices with cooperative matrices.
    pub const fn cooperative(mut self, matrices: Cooperative) -> Self {
        self.spec.features = crate::adapter::COOPERATIVE_FEATURES;
        self.spec.cooperative = matrices;
        self
    }

    /// The plan of a problem.
    ///
    /// # Errors
    /// `KernelError::Problem` for a problem that the operation or the shader cannot compute, or a setting that does not exist;
    /// [`Error::Limit`] for a limit of the device.
    pub fn plan(&self, op: &O, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        let possible = check_widths(&op.widths()).and_then(|()| op.validate());
        possible.map_err(|problem| Error::problem(O::NAME, problem))?;
        let name = self.spec.name;
        let setting = tuning.choose(name, self.spec.tunings, context.auto(name, (self.auto)(op, context)))?;
        let draft = (self.draft)(op, context, setting).map_err(|problem| Error::problem(name, problem))?;
        draft.checked(name, &context.limits)
    }
}

/// Picks the shader that runs: the first variant that the device supports and that is not left out, that is preferred, and whose
/// plan is within the limits, at its own setting or else at the first other one within them.
///
/// # Errors
/// The refusal of the last candidate.
pub fn choose<O: Op>(op: &O, context: &PlanContext) -> Result<(&'static Variant<O>, Plan)> {
    let mut refusal = None;
    for variant in O::VARIANTS {
        let runs = variant.spec.offered(context) && !context.left_out.0.contains_key(variant.spec.name);
        if !runs || !(variant.preferred)(op, context) {
            continue;
        }
        let error = match variant.plan(op, context, Tuning::Auto) {
            Ok(plan) => return Ok((variant, plan)),
            Err(error) => error,
        };
        if matches!(error, Error::Limit { .. }) {
            let plan = |setting| variant.plan(op, context, Tuning::Forced(setting)).ok();
            if let Some(plan) = (0..variant.spec.tunings).find_map(plan) {
                return Ok((variant, plan));
            }
        }
        refusal = Some(error);
    }
    Err(refusal.unwrap_or_else(|| Error::problem(O::NAME, "no shader of it runs on this device")))
}

/// Checks assumptions in order.
///
/// # Errors
/// The words of the first that does not hold.
pub fn hold(assumptions: &[(bool, &'static str)]) -> Result<(), &'static str> {
    assumptions.iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, words)| Err(*words))
}

/// No assumptions: for shaders that take any plan.
///
/// # Errors
/// None.
pub fn anything<O>(_: &O, _: &PlanContext, _: &Plan) -> Result<(), &'static str> {
    Ok(())
}

/// Lets the checks redraw every number of a problem; a missing field does not compile.
#[doc(hidden)]
#[macro_export]
macro_rules! vary {
    ($of:ident { $($field:ident),* $(,)? }) => {
        #[cfg(feature = "check")]
        impl $crate::low_level::Vary for $of {
            fn vary(&mut self, next: &mut dyn FnMut() -> u32) {
                let $of { $($field),* } = self;
                $($crate::low_level::Vary::vary($field, next);)*
            }
        }
    };
}
