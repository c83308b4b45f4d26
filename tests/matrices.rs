//! Where cooperative matrices are loaded from and stored to, without a GPU. Vulkan wants these places at multiples of 16 bytes
//! (or of a matrix row, where that is less), and rows of such lengths. No driver here minds others, no validation layer says so,
//! and a GPU computes nonsense.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod shaders;

use std::collections::BTreeSet;

use egmla::low_level::Cooperative;
use egmla::low_level::kernels::shaders;
use naga::proc::Layouter;
use naga::{BinaryOperator, Expression, Function, Handle, Literal, LocalVariable, Module, Statement};
use shaders::{each_case, parse};

/// Bytes that every place and every row of a matrix is a multiple of.
const ALIGNMENT: u64 = 16;

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Visits every statement of a block.
fn each_statement<'a>(block: &'a naga::Block, visit: &mut dyn FnMut(&'a Statement)) {
    for statement in block {
        visit(statement);
        match statement {
            Statement::Block(inner) => each_statement(inner, visit),
            Statement::If { accept: one, reject: other, .. } | Statement::Loop { body: one, continuing: other, .. } => {
                each_statement(one, visit);
                each_statement(other, visit);
            }
            Statement::Switch { cases, .. } => cases.iter().for_each(|case| each_statement(&case.body, visit)),
            _ => {}
        }
    }
}

/// What whole numbers of a function are multiples of, whatever its parameters hold.
struct Multiples<'a> {
    module: &'a Module,
    function: &'a Function,
    /// What local variables are taken to be multiples of so far.
    assumed: Vec<(Handle<LocalVariable>, u64)>,
}

impl Multiples<'_> {
    /// A number that divides the expression; 0 for 0 itself.
    fn of(&mut self, expression: Handle<Expression>) -> u64 {
        let function = self.function;
        match function.expressions[expression] {
            Expression::Literal(Literal::U32(value)) => value.into(),
            Expression::Constant(constant) => {
                match self.module.global_expressions[self.module.constants[constant].init] {
                    Expression::Literal(Literal::U32(value)) => value.into(),
                    _ => 1,
                }
            }
            Expression::ZeroValue(_) => 0,
            Expression::Binary { op: BinaryOperator::Divide, left, right } => match function.expressions[right] {
                Expression::Literal(Literal::U32(by)) => match self.of(left) {
                    left if left.is_multiple_of(by.into()) => left / u64::from(by),
                    _ => 1,
                },
                _ => 1,
            },
            Expression::Binary { op, left, right } => {
                let (left, right) = (self.of(left), self.of(right));
                match op {
                    BinaryOperator::Add | BinaryOperator::Subtract | BinaryOperator::Modulo => gcd(left, right),
                    BinaryOperator::Multiply => left.saturating_mul(right),
                    _ => 1,
                }
            }
            Expression::Select { accept, reject, .. } => gcd(self.of(accept), self.of(reject)),
            Expression::Load { pointer } => match function.expressions[pointer] {
                Expression::LocalVariable(variable) => self.of_variable(variable),
                _ => 1,
            },
            _ => 1,
        }
    }

    /// The largest that every assignment keeps to, if the variable itself is a multiple of it before.
    fn of_variable(&mut self, variable: Handle<LocalVariable>) -> u64 {
        if let Some((_, assumed)) = self.assumed.iter().find(|(known, _)| *known == variable) {
            return *assumed;
        }
        let mut values = Vec::from_iter(self.function.local_variables[variable].init);
        each_statement(&self.function.body, &mut |statement| {
            if let Statement::Store { pointer, value } = *statement
                && self.function.expressions[pointer] == Expression::LocalVariable(variable)
            {
                values.push(value);
            }
        });
        let mut assumed = 0;
        loop {
            self.assumed.push((variable, assumed));
            let found = values.iter().fold(assumed, |all, &value| gcd(all, self.of(value)));
            self.assumed.pop();
            if found == assumed {
                return found;
            }
            assumed = found;
        }
    }
}

/// What is wrong with the workgroup memory of a shader with matrices, and the number of places looked at.
fn misplaced(module: &Module) -> (BTreeSet<String>, usize) {
    let mut layouter = Layouter::default();
    layouter.update(module.to_ctx()).unwrap();
    let mut problems = BTreeSet::new();
    // A driver may lay variables out in any order, each where the one before it ends.
    for (_, variable) in module.global_variables.iter() {
        let size = layouter[variable.ty].size;
        if variable.space == naga::AddressSpace::WorkGroup && !u64::from(size).is_multiple_of(ALIGNMENT) {
            problems.insert(format!("{} has {size} bytes", variable.name.as_deref().unwrap()));
        }
    }
    let mut places = 0;
    let functions = module.functions.iter().map(|(_, function)| function);
    for function in functions.chain(module.entry_points.iter().map(|entry| &entry.function)) {
        let mut all: Vec<naga::CooperativeData> = Vec::new();
        for (_, expression) in function.expressions.iter() {
            if let Expression::CooperativeLoad { data, .. } = expression {
                all.push(*data);
            }
        }
        each_statement(&function.body, &mut |statement| {
            if let Statement::CooperativeStore { data, .. } = statement {
                all.push(*data);
            }
        });
        for data in all {
            places += 1;
            let (base, mut multiples) = match function.expressions[data.pointer] {
                Expression::Access { base, index } => {
                    (base, vec![("begins", Multiples { module, function, assumed: Vec::new() }.of(index))])
                }
                Expression::AccessIndex { base, index } => (base, vec![("begins", u64::from(index))]),
                ref other => panic!("a matrix at {other:?}"),
            };
            let Expression::GlobalVariable(variable) = function.expressions[base] else { panic!("of a local array") };
            let variable = &module.global_variables[variable];
            let naga::TypeInner::Array { stride, .. } = module.types[variable.ty].inner else { panic!("of no array") };
            multiples.push(("rows", Multiples { module, function, assumed: Vec::new() }.of(data.stride)));
            for (what, elements) in multiples {
                let bytes = elements * u64::from(stride);
                if !bytes.is_multiple_of(ALIGNMENT) {
                    let (of, name) = (function.name.as_deref().unwrap_or("main"), variable.name.as_deref().unwrap());
                    problems.insert(format!("{of}: {name} {what} at multiples of {bytes} bytes"));
                }
            }
        }
    }
    (problems, places)
}

fn specialised(source: &str, spec: &egmla::low_level::Spec, overrides: &[(&'static str, f64)]) -> Module {
    let module = naga::front::wgsl::parse_str(source).unwrap();
    let info = shaders::validate(spec.name, &module);
    let constants = overrides.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
    let entry = Some((naga::ShaderStage::Compute, "main"));
    naga::back::pipeline_constants::process_overrides(&module, &info, entry, &constants).unwrap().0.into_owned()
}

#[test]
fn matrices_lie_where_vulkan_wants_them() {
    let mut seen = BTreeSet::new();
    each_case(|case| {
        let spec = case.spec;
        if spec.cooperative == Cooperative::NONE {
            return;
        }
        let key: Vec<u64> = case.plan.overrides.iter().map(|(_, value)| value.to_bits()).collect();
        if seen.insert((spec.name, key)) {
            let (problems, places) = misplaced(&specialised(spec.source, spec, &case.plan.overrides));
            assert!(problems.is_empty(), "{}: {problems:?}", case.what());
            assert!(places > 2, "{}: {places} places", case.what());
        }
    });
    let looked_at: BTreeSet<_> = seen.into_iter().map(|(name, _)| name).collect();
    let with_matrices = shaders().filter(|spec| spec.cooperative != Cooperative::NONE).map(|spec| spec.name);
    assert_eq!(looked_at, with_matrices.collect());
    // Other shaders have none.
    for spec in shaders().filter(|spec| spec.cooperative == Cooperative::NONE) {
        assert_eq!(misplaced(&parse(spec).0).1, 0, "{}", spec.name);
    }
}

#[test]
fn a_misplaced_matrix_is_seen() {
    for (name, old, new) in [
        ("attention_prefill_cooperative", "sh_scaled: vec4<u32>", "sh_scaled: vec3<u32>"),
        ("attention_prefill_cooperative", "VALUE_PITCH: u32 = (SLICE + 8u)", "VALUE_PITCH: u32 = (SLICE + 4u)"),
        ("attention_prefill_cooperative", "share * SIDE;", "share * 2u;"),
        ("attention_prefill_cooperative_8", "sh_stage[v_at], VALUE_PITCH", "sh_stage[v_at + 4u], VALUE_PITCH"),
        ("matmul_cooperative_8", "sh_x: array<f16, STAGES * X_STAGE>", "sh_x: array<f16, STAGES * X_STAGE + 2u>"),
        ("roofline_cooperative", "&sh_x[MATRIX], SIDE", "&sh_x[MATRIX - 4u], SIDE"),
    ] {
        let spec = shaders().find(|spec| spec.name == name).unwrap();
        assert_eq!(spec.source.matches(old).count(), 1, "{name}: {old}");
        let (problems, _) = misplaced(&specialised(&spec.source.replace(old, new), spec, &[]));
        assert_eq!(problems.len(), 1, "{name}: {new}: {problems:?}");
    }
}
