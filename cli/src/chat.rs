//! `generate --chat`: the model's template writes a conversation as the text that it continues.

use egmla::decoder::TextRules;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value, context};
use serde::Serialize as _;

use crate::failure::Failure;

/// Steps of a template, and units of 64 bytes that it may make: published ones take some thousands. A template is a program of
/// whoever made the model.
const FUEL: u64 = 1 << 20;

/// A conversation with one message of the user, up to where the answer begins.
///
/// # Errors
/// Bad input, in one line: a model without a template, or a template that fails.
pub fn write(rules: &TextRules, system: Option<&str>, user: &str) -> Result<String, Failure> {
    let Some(template) = &rules.chat_template else {
        return Err(Failure::usage(
            "--chat: the model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)",
        ));
    };
    let message = |role: &str, content: &str| context! { role, content };
    let messages: Vec<Value> =
        system.map(|content| message("system", content)).into_iter().chain([message("user", user)]).collect();
    let tokens = Value::from_pairs(rules.special_tokens.iter().map(|(key, token)| (key.as_str(), token.as_str())));
    let values = context! { messages, add_generation_prompt => true, tools => Value::from(()), documents => Value::from(()), ..tokens };
    let written = environment()?.render_str(template, values).map_err(|error| {
        // What a template raises is its author's own words.
        let words = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
        let line = error.line().map_or_else(String::new, |line| format!(", line {line}"));
        Failure::usage(format!("chat template{line}: {words}"))
    })?;
    if written.is_empty() {
        return Err(Failure::usage("chat template: it writes nothing"));
    }
    Ok(written)
}

/// Jinja as published templates expect it.
fn environment() -> Result<Environment<'static>, Failure> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(Failure::run)?);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: &str| {
        let failed = |error: jiff::Error| Error::new(ErrorKind::InvalidOperation, error.to_string());
        jiff::fmt::strtime::format(format, &jiff::ZonedDateTime::now()).map_err(failed)
    });
    environment.add_filter("tojson", to_json);
    Ok(environment)
}

/// As Python's `json.dumps` writes it: no character is escaped for HTML.
fn to_json(value: &Value, options: minijinja::value::Kwargs) -> Result<String, Error> {
    let indent = options.get::<Option<usize>>("indent")?.map(|indent| " ".repeat(indent.min(16)));
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut bytes = Vec::new();
    match &indent {
        Some(indent) => {
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, pretty)).map_err(failed)?;
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Spaced)).map_err(failed)?,
    }
    String::from_utf8(bytes).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// A space after every comma and colon.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::time::{Duration, Instant};

    use super::{TextRules, write};
    use crate::failure::Failure;

    fn rules(template: &str) -> TextRules {
        let tokens =
            [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(key, token)| (key.to_owned(), token.to_owned()));
        TextRules { chat_template: Some(template.to_owned()), special_tokens: tokens.into(), ..TextRules::default() }
    }

    fn written(template: &str, system: Option<&str>) -> String {
        write(&rules(template), system, "Hi <b> ").unwrap()
    }

    #[test]
    fn templates_write_what_python_writes() {
        // As published ones do: blocks on lines of their own, methods of Python, loops that are left, tokens by name.
        let template = "{{ bos_token }}{% for message in messages %}\n    {%- if message['role'] == 'system' %}\n        \
            {{- '[' + message.content.strip() + ']' }}\n    {%- elif message.role not in ['user', 'assistant'] %}\n        \
            {{- raise_exception('roles') }}\n    {%- else %}\n        {{- '<|' ~ message['role'] ~ '|>' ~ message['content'] | trim \
            ~ eos_token }}\n    {%- endif %}\n{%- endfor %}\n{% if add_generation_prompt %}<|assistant|>{% endif %}";
        assert_eq!(written(template, None), "<s><|user|>Hi <b></s><|assistant|>");
        assert_eq!(written(template, Some(" Be kind ")), "<s>[Be kind]<|user|>Hi <b></s><|assistant|>");
        let methods = "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% break %}\
            {% endfor %}{{ messages[0]['content'].split(' ')[0].upper() }}{{ messages[-1].items() | list | length }}\
            {{ 'x'.startswith('x') }}{{ tools is none }}{{ nothing is defined }}";
        assert_eq!(written(methods, None), "HI2TrueTrueFalse");
        assert_eq!(written("{{ messages[0] | tojson }}", None), r#"{"role": "user", "content": "Hi <b> "}"#);
        assert_eq!(written("{{ [1, 'é'] | tojson(indent=2) }}", None), "[\n  1,\n  \"é\"\n]");
        let today = written("{{ strftime_now('%Y-%m-%d') }}", None);
        assert!(today.len() == 10 && today.starts_with("20"), "{today}");
    }

    #[test]
    fn a_template_that_fails_is_one_line_and_soon() {
        let start = Instant::now();
        for (template, part) in [
            ("{{ raise_exception('no system messages, please') }}", "no system messages, please"),
            ("{% if %}", "line 1"),
            ("{{ undefined.field.field }}", "undefined"),
            ("{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}", "fuel"),
            ("{% set ns = namespace(a='x') %}{% for i in range(64) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}", "fuel"),
            ("{{ 'x' * 100000000000 }}", "fuel"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
            ("{{ strftime_now('%Q%') }}", "%"),
            ("{% include 'other' %}", "include"),
            ("", "nothing"),
        ] {
            let Err(Failure::Usage(problem)) = write(&rules(template), None, "Hi") else { unreachable!("{template}") };
            assert!(problem.contains("chat template") && problem.contains(part), "{template}: {problem}");
        }
        assert!(start.elapsed() < Duration::from_secs(20));
        let without = write(&TextRules::default(), None, "Hi").unwrap_err();
        assert!(matches!(without, Failure::Usage(problem) if problem.contains("no chat template")));
    }
}
