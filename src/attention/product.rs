//! Which kernel computes a matrix product.

use crate::error::Result;
use crate::kernel::{KernelSpec, Recording};
use crate::kernels::{
    Problem, matmul, matmul_cooperative, matmul_cooperative_8, matmul_subgroup, matmul_vec4, matvec, matvec_subgroup,
    matvec_vec4,
};
use crate::plan::{AdapterClass, PlanContext, Storage, Tuning};

/// Fewest rows for cooperative matrices: half the rows of their smallest tile on most adapters.
const COOPERATIVE_ROWS: u32 = 32;

/// Records `y = x · wᵀ + bias` with the kernel that suits its sizes, its layout and the device.
///
/// # Errors
/// What the kernel refuses.
pub(crate) fn product_of(recording: &mut Recording, problem: matmul::Problem, args: matmul::Args<'_>) -> Result<()> {
    let auto = Tuning::Auto;
    match Kernel::of(&problem, recording.kernels().context()) {
        Kernel::Matmul => matmul::encode(recording, &problem, args, auto),
        Kernel::MatmulCooperative => {
            matmul_cooperative::encode(recording, &matmul_cooperative::Problem(problem), args, auto)
        }
        Kernel::MatmulCooperative8 => {
            matmul_cooperative_8::encode(recording, &matmul_cooperative_8::Problem(problem), args, auto)
        }
        Kernel::MatmulSubgroup => matmul_subgroup::encode(recording, &matmul_subgroup::Problem(problem), args, auto),
        Kernel::MatmulVec4 => matmul_vec4::encode(recording, &matmul_vec4::Problem(problem), args, auto),
        Kernel::Matvec => matvec::encode(recording, &matvec::Problem(problem), args, auto),
        Kernel::MatvecSubgroup => matvec_subgroup::encode(recording, &matvec_subgroup::Problem(problem), args, auto),
        Kernel::MatvecVec4 => matvec_vec4::encode(recording, &matvec_vec4::Problem(problem), args, auto),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    Matmul,
    MatmulCooperative,
    MatmulCooperative8,
    MatmulSubgroup,
    MatmulVec4,
    Matvec,
    MatvecSubgroup,
    MatvecVec4,
}

impl Kernel {
    fn of(problem: &matmul::Problem, context: &PlanContext) -> Self {
        let few = problem.rows <= matvec::MOST_ROWS;
        if !problem.in_vec4() {
            return if few { Kernel::Matvec } else { Kernel::Matmul };
        }
        let offered = |spec: &KernelSpec| spec.missing(context).is_none();
        // They round x: only where the weights are rounded, too. A software adapter gains nothing by them.
        if problem.storage == Storage::F16
            && problem.rows >= COOPERATIVE_ROWS
            && context.class != AdapterClass::Software
        {
            if runs(&matmul_cooperative::Problem(*problem), context) {
                return Kernel::MatmulCooperative;
            }
            if runs(&matmul_cooperative_8::Problem(*problem), context) {
                return Kernel::MatmulCooperative8;
            }
        }
        match context.class {
            // On lavapipe the shuffles pay from the second row on.
            AdapterClass::Software if problem.rows > 1 && offered(&matmul_subgroup::SPEC) => Kernel::MatmulSubgroup,
            AdapterClass::Software if few => Kernel::MatvecVec4,
            _ if few && offered(&matvec_subgroup::SPEC) => Kernel::MatvecSubgroup,
            _ if few => Kernel::MatvecVec4,
            _ => Kernel::MatmulVec4,
        }
    }
}

/// Whether the device has what the kernel needs, and the problem fits its limits.
pub(super) fn runs<P: Problem>(problem: &P, context: &PlanContext) -> bool {
    P::SPEC.missing(context).is_none() && problem.plan(context, Tuning::Auto).is_ok()
}

#[cfg(test)]
mod tests {
    use super::Kernel;
    use crate::kernels::{COOPERATIVE_FEATURES, matmul};
    use crate::plan::{AdapterClass, Cooperative, PlanContext, Storage};

    fn chosen(class: AdapterClass, features: wgpu::Features, rows: u32, inner: u32, storage: Storage) -> Kernel {
        let context = PlanContext { features, ..PlanContext::webgpu_defaults(class) };
        Kernel::of(&matmul::Problem::linear(rows, inner, 64, false, storage), &context)
    }

    #[test]
    fn every_kernel_has_its_place_and_variants_only_where_they_are_offered() {
        let (none, subgroup) = (wgpu::Features::empty(), wgpu::Features::SUBGROUP);
        for class in AdapterClass::ALL {
            // 12 halves are no whole number of 16-byte loads.
            for (inner, storage) in [(0, Storage::F32), (6, Storage::F32), (12, Storage::F16)] {
                assert_eq!(chosen(class, subgroup, 8, inner, storage), Kernel::Matvec);
                assert_eq!(chosen(class, subgroup, 9, inner, storage), Kernel::Matmul);
            }
            assert_eq!(chosen(class, none, 1, 12, Storage::F32), Kernel::MatvecVec4);
            assert_eq!(chosen(class, none, 8, 16, Storage::F16), Kernel::MatvecVec4);
            assert_eq!(chosen(class, none, 9, 16, Storage::F16), Kernel::MatmulVec4);
        }
        let software = |rows| chosen(AdapterClass::Software, subgroup, rows, 16, Storage::F32);
        assert_eq!([software(1), software(2)], [Kernel::MatvecVec4, Kernel::MatmulSubgroup]);
        let discrete = |rows| chosen(AdapterClass::Discrete, subgroup, rows, 16, Storage::F32);
        assert_eq!([discrete(1), discrete(9)], [Kernel::MatvecSubgroup, Kernel::MatmulVec4]);
    }

    #[test]
    fn cooperative_matrices_multiply_halves_of_many_rows_where_they_are_offered() {
        let chosen = |class, features, cooperative, rows, storage| {
            let context = PlanContext { features, cooperative, ..PlanContext::webgpu_defaults(class) };
            Kernel::of(&matmul::Problem::linear(rows, 16, 64, false, storage), &context)
        };
        let both = Cooperative { by_16: true, by_8: true };
        let (none, all) = (wgpu::Features::empty(), COOPERATIVE_FEATURES);
        for class in [AdapterClass::Integrated, AdapterClass::Discrete, AdapterClass::Apple] {
            for (cooperative, kernel) in [
                (Cooperative::NONE, Kernel::MatmulVec4),
                (Cooperative::BY_8, Kernel::MatmulCooperative8),
                (Cooperative::BY_16, Kernel::MatmulCooperative),
                (both, Kernel::MatmulCooperative),
            ] {
                assert_eq!(chosen(class, all, cooperative, 32, Storage::F16), kernel);
                assert_eq!(chosen(class, all, cooperative, 31, Storage::F16), Kernel::MatmulVec4);
                // Never where the result has to be that of f32 arithmetic, nor on a device opened without the features.
                assert_eq!(chosen(class, all, cooperative, 32, Storage::F32), Kernel::MatmulVec4);
                assert_eq!(chosen(class, none, cooperative, 32, Storage::F16), Kernel::MatmulVec4);
            }
        }
        assert_eq!(chosen(AdapterClass::Software, all, both, 32, Storage::F16), Kernel::MatmulSubgroup);
        // 12 halves are no whole number of 16-byte loads; subgroups of 128 make workgroups that no limit promises.
        let context =
            PlanContext { features: all, cooperative: both, ..PlanContext::webgpu_defaults(AdapterClass::Discrete) };
        let ragged = matmul::Problem::linear(32, 12, 64, false, Storage::F16);
        assert_eq!(Kernel::of(&ragged, &context), Kernel::Matmul);
        let wide = PlanContext { subgroup_max_size: 128, ..context };
        let whole = matmul::Problem::linear(32, 16, 64, false, Storage::F16);
        assert_eq!(Kernel::of(&whole, &wide), Kernel::MatmulVec4);
    }

    #[test]
    fn operands_suit_16_byte_loads_only_where_every_step_does() {
        let dense = matmul::Problem::linear(2, 16, 8, false, Storage::F16);
        assert!(dense.in_vec4());
        let x = |x| matmul::Problem { x, ..dense };
        let w = |w| matmul::Problem { w, ..dense };
        let step = matmul::Layout::dense(16);
        assert!(x(matmul::Layout { offset: 4, row: 20, batch: 12, ..step }).in_vec4());
        assert!(!x(matmul::Layout { offset: 2, ..step }).in_vec4());
        assert!(!x(matmul::Layout { row: 18, ..step }).in_vec4());
        assert!(!x(matmul::Layout { batch: 1, ..step }).in_vec4());
        assert!(!w(matmul::Layout { offset: 4, ..step }).in_vec4());
        assert!(!w(matmul::Layout { row: 20, ..step }).in_vec4());
        assert!(!w(matmul::Layout { batch: 4, ..step }).in_vec4());
        assert!(!w(matmul::Layout { inner: 8, row: 1, ..step }).in_vec4());
        assert!(w(matmul::Layout { offset: 8, row: 24, batch: 8, ..step }).in_vec4());
    }
}
