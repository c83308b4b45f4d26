//! Operations of different types in one list.

use std::any::TypeId;

#[cfg(feature = "check")]
use crate::cost::Cost;
#[cfg(not(feature = "check"))]
use crate::op::Op;
use crate::op::{Binding, Buffers, Spec, Uniform as _};
#[cfg(feature = "check")]
use crate::sample::{Sample, Sampled};

/// An operation of the registry.
#[cfg(feature = "check")]
pub trait Registered: Sampled {}

#[cfg(feature = "check")]
impl<O: Sampled> Registered for O {}

/// An operation of the registry.
#[cfg(not(feature = "check"))]
pub trait Registered: Op {}

#[cfg(not(feature = "check"))]
impl<O: Op> Registered for O {}

/// An operation of the registry, of any type.
pub trait AnyOp: Sync {
    /// The stem of its files, labels and bench rows.
    fn name(&self) -> &'static str;

    /// Its type.
    fn id(&self) -> TypeId;

    /// The storage bindings of its shaders.
    fn bindings(&self) -> &'static [Binding];

    /// Name and WGSL type of every parameter.
    fn params(&self) -> &'static [(&'static str, &'static str)];

    /// Its shaders, best first.
    fn shaders(&self) -> Vec<&'static Spec>;

    /// Problems around every tile size, and with every switch.
    #[cfg(feature = "check")]
    fn samples(&self) -> Vec<Box<dyn Sample>>;

    /// Problems with their cost, counted by hand.
    #[cfg(feature = "check")]
    fn counted(&self) -> Vec<(Box<dyn Sample>, Cost)>;

    /// A problem whose every number is drawn.
    #[cfg(feature = "check")]
    fn drawn(&self, next: &mut dyn FnMut() -> u32) -> Option<Box<dyn Sample>>;
}

/// The operation `O`, as an [`AnyOp`].
#[derive(Debug)]
pub struct Of<O>(std::marker::PhantomData<fn() -> O>);

impl<O: Registered> Of<O> {
    /// The one value.
    pub const NEW: Self = Of(std::marker::PhantomData);
}

impl<O: Registered> AnyOp for Of<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn id(&self) -> TypeId {
        TypeId::of::<O>()
    }

    fn bindings(&self) -> &'static [Binding] {
        <O::Args<u64> as Buffers<u64>>::BINDINGS
    }

    fn params(&self) -> &'static [(&'static str, &'static str)] {
        O::Params::FIELDS
    }

    fn shaders(&self) -> Vec<&'static Spec> {
        O::VARIANTS.iter().map(|variant| &variant.spec).collect()
    }

    #[cfg(feature = "check")]
    fn samples(&self) -> Vec<Box<dyn Sample>> {
        O::samples().into_iter().map(|op| Box::new(op) as Box<dyn Sample>).collect()
    }

    #[cfg(feature = "check")]
    fn counted(&self) -> Vec<(Box<dyn Sample>, Cost)> {
        O::counted().into_iter().map(|(op, cost)| (Box::new(op) as Box<dyn Sample>, cost)).collect()
    }

    #[cfg(feature = "check")]
    fn drawn(&self, next: &mut dyn FnMut() -> u32) -> Option<Box<dyn Sample>> {
        let (mut op, _) = O::counted().into_iter().next()?;
        op.vary(next);
        Some(Box::new(op))
    }
}
