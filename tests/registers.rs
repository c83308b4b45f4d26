//! What functions keep in variables stays in registers, whatever a compiler makes of loops: private arrays, matrices and vectors
//! are indexed by constants alone. A compiler that keeps a loop, as one does where a browser has it count the turns, puts what
//! the loop indexes into memory. Override settings make no difference: an override is a constant.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod shaders;

use std::collections::BTreeSet;

use egmla::low_level::kernels::shaders;
use naga::valid::ModuleInfo;
use naga::{AddressSpace, Expression, Function, Handle, Module, TypeInner};
use shaders::{parse, validate};

/// Whether an expression has one value in all of a pipeline.
fn constant(function: &Function, expression: Handle<Expression>) -> bool {
    match function.expressions[expression] {
        Expression::Literal(_) | Expression::Constant(_) | Expression::Override(_) => true,
        Expression::Binary { left, right, .. } => constant(function, left) && constant(function, right),
        _ => false,
    }
}

/// The variable, argument or named value under all indices.
fn root(function: &Function, expression: Handle<Expression>) -> &str {
    match function.expressions[expression] {
        Expression::Access { base, .. } | Expression::AccessIndex { base, .. } | Expression::Load { pointer: base } => {
            root(function, base)
        }
        Expression::LocalVariable(variable) => function.local_variables[variable].name.as_deref().unwrap(),
        Expression::FunctionArgument(argument) => function.arguments[argument as usize].name.as_deref().unwrap(),
        _ => function.named_expressions.get(&expression).map_or("a value", String::as_str),
    }
}

/// Each function, and what it indexes by something that is no constant.
fn indexed(module: &Module, info: &ModuleInfo) -> BTreeSet<String> {
    let functions = module.functions.iter().map(|(handle, function)| (function, &info[handle]));
    let entries = module.entry_points.iter().enumerate().map(|(i, entry)| (&entry.function, info.get_entry_point(i)));
    let mut found = BTreeSet::new();
    for (function, info) in functions.chain(entries) {
        for (_, expression) in function.expressions.iter() {
            let Expression::Access { base, index } = *expression else { continue };
            let (variable, inner) = match info[base].ty.inner_with(&module.types) {
                &TypeInner::Pointer { base, space: AddressSpace::Function | AddressSpace::Private } => {
                    (true, &module.types[base].inner)
                }
                inner => (false, inner),
            };
            let private = match *inner {
                TypeInner::Array { .. } | TypeInner::Matrix { .. } => true,
                TypeInner::ValuePointer { space, .. } => {
                    [AddressSpace::Function, AddressSpace::Private].contains(&space)
                }
                // A vector that is no variable can be selected from where it is.
                TypeInner::Vector { .. } => variable,
                _ => false,
            };
            if private && !constant(function, index) {
                let name = function.name.as_deref().unwrap_or("main");
                found.insert(format!("{name}: {}", root(function, base)));
            }
        }
    }
    found
}

#[test]
fn variables_are_indexed_by_constants() {
    let found: Vec<_> = shaders()
        .flat_map(|spec| {
            let (module, info) = parse(spec);
            indexed(&module, &info).into_iter().map(|what| (spec.name, what))
        })
        .collect();
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn an_indexed_variable_is_seen() {
    for (declared, used, expected) in [
        ("var private: array<f32, 8>;", "private[c]", Some("private")),
        ("var private: array<mat4x4<f32>, 8>;", "private[2][c][1]", Some("private")),
        ("var private: mat4x4<f32>;", "private[c].x", Some("private")),
        ("var private: vec4<f32>;", "private[c]", Some("private")),
        ("var private: array<vec4<f32>, 8>;", "private[2][c]", Some("private")),
        ("let value = array<f32, 2>(1.0, 2.0);", "value[c]", Some("value")),
        ("let value = mat2x2<f32>();", "value[c].x", Some("value")),
        ("let value = vec4<f32>();", "value[c]", None),
        ("var private: array<f32, 8>;", "private[WIDE + 1u]", None),
        ("var private: array<f32, 8>;", "private[ALSO / 2u]", None),
        ("let at = 3u * params.elements;", "data[at + c]", None),
        ("var private: array<f32, 8>;", "nth(&private, c)", Some("nth: indexed")),
        ("", "kept[c]", Some("a value")),
        ("", "kept[WIDE]", None),
    ] {
        let source = format!(
            "override ALSO: u32 = 2u; const WIDE: u32 = 2u; struct Params {{ elements: u32 }}
            @group(0) @binding(0) var<uniform> params: Params;
            @group(0) @binding(1) var<storage, read_write> data: array<f32>;
            var<private> kept: array<f32, 8>;
            fn nth(indexed: ptr<function, array<f32, 8>>, i: u32) -> f32 {{ return (*indexed)[{}]; }}
            @compute @workgroup_size(1) fn main() {{
                {declared}
                for (var c = 0u; c < ALSO; c++) {{ data[c] += {used}; }}
            }}",
            if used.starts_with("nth") { "i" } else { "1u" }
        );
        let module = naga::front::wgsl::parse_str(&source).unwrap();
        let info = validate("gather", &module);
        let expected = expected.map(|what| if what.contains(':') { what.to_owned() } else { format!("main: {what}") });
        assert_eq!(indexed(&module, &info), BTreeSet::from_iter(expected), "{declared} {used}");
    }
}
