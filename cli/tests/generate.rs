//! What ends a text of `egmla generate`, where its prompt comes from, and how long it may be.

#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

/// Copies the committed model and adds files to it.
fn model(files: &[(&str, String)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let committed = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("models/shakespeare");
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(committed.join(name), folder.path().join(name)).unwrap();
    }
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

fn run(model: &Path, options: &[&str], stdin: &[u8]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_egmla"));
    command.args(["generate", "--temperature", "0", "--model", model.to_str().unwrap()]).args(options);
    if !options.contains(&"--adapter") {
        command.args(["--adapter", "cpu"]);
    }
    command.env_remove("RUST_LOG").env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A program that reads no stdin may have ended.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child.wait_with_output().unwrap()
}

#[track_caller]
fn done(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn report(model: &Path, options: &[&str]) -> Value {
    let output = run(model, &[&["--prompt", "ROMEO:", "--json"], options].concat(), b"");
    serde_json::from_str(&done(&output)).unwrap()
}

#[track_caller]
fn refused(output: &Output, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), stderr.lines().count()), (Some(2), 1), "{stderr}");
    assert!(output.stdout.is_empty() && stderr.starts_with("error: "), "{output:?}");
    parts.iter().for_each(|part| assert!(stderr.contains(part), "`{part}` is not in {stderr}"));
}

fn ids(report: &Value) -> Vec<u64> {
    report["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

#[test]
fn a_text_ends_where_the_model_ends_it() {
    let plain = report(model(&[]).path(), &["--max-new-tokens", "20"]);
    assert_eq!((plain["finish_reason"].as_str(), ids(&plain).len()), (Some("length"), 20));
    // A token that was not written before.
    let (end, id) =
        ids(&plain).into_iter().enumerate().find(|(i, id)| *i > 3 && !ids(&plain)[..*i].contains(id)).unwrap();
    let of = |id: Value| ("generation_config.json", json!({"eos_token_id": id}).to_string());
    for id in [json!(id), json!([1023, id])] {
        let ended = report(model(&[of(id)]).path(), &["--max-new-tokens", "20"]);
        assert_eq!((ended["finish_reason"].as_str(), ids(&ended)), (Some("eos"), ids(&plain)[..end].to_vec()));
        assert!(plain["text"].as_str().unwrap().starts_with(ended["text"].as_str().unwrap()));
    }
    // At once: a text of no token.
    let nothing = report(model(&[of(json!(ids(&plain)[0]))]).path(), &[]);
    assert_eq!((nothing["new_tokens"].as_u64(), nothing["text"].as_str()), (Some(0), Some("")));
    refused(
        &run(model(&[of(json!("x"))]).path(), &["--prompt", "a"], b""),
        &["generation_config.json", "eos_token_id"],
    );
}

#[test]
fn special_tokens_are_not_shown() {
    let plain = report(model(&[]).path(), &["--max-new-tokens", "8"]);
    let folder = model(&[]);
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let id = ids(&plain)[2];
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let content = vocab.iter().find(|(_, of)| of.as_u64() == Some(id)).unwrap().0.clone();
    tokenizer["added_tokens"] = json!([{"id": id, "content": content, "special": true, "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false}]);
    fs::write(path, tokenizer.to_string()).unwrap();
    let hidden = report(folder.path(), &["--max-new-tokens", "8"]);
    assert_eq!(ids(&hidden), ids(&plain));
    let shown = content.replace('Ġ', " ").replace('Ċ', "\n");
    let text = plain["text"].as_str().unwrap();
    assert!(text.contains(&shown) && hidden["text"].as_str().unwrap().len() < text.len(), "{shown:?} {text:?}");
}

#[test]
fn a_stop_ends_the_text_and_is_not_shown() {
    let folder = model(&[]);
    let plain = report(folder.path(), &["--max-new-tokens", "40"]);
    let text = plain["text"].as_str().unwrap();
    // Longer than a token, so that it spans some.
    let stop = &text[text.char_indices().nth(20).unwrap().0..text.char_indices().nth(32).unwrap().0];
    let stopped = report(folder.path(), &["--max-new-tokens", "40", "--stop", "not in it", "--stop", stop]);
    let expected = &text[..text.find(stop).unwrap()];
    assert_eq!((stopped["finish_reason"].as_str(), stopped["text"].as_str()), (Some("stop"), Some(expected)));
    assert!(ids(&stopped).len() < 40);
    let shown = done(&run(folder.path(), &["--prompt", "ROMEO:", "--max-new-tokens", "40", "--stop", stop], b""));
    assert_eq!(shown, format!("ROMEO:{expected}\n"));
    refused(&run(folder.path(), &["--prompt", "a", "--stop", ""], b""), &["--stop"]);
}

#[test]
fn a_prompt_comes_from_stdin() {
    let folder = model(&[]);
    let given = done(&run(folder.path(), &["--prompt", "ROMEO:\nBut", "--max-new-tokens", "5"], b""));
    for options in [&["--max-new-tokens", "5"][..], &["--prompt", "-", "--max-new-tokens", "5"]] {
        for stdin in ["ROMEO:\nBut", "ROMEO:\nBut\n", "ROMEO:\nBut\r\n"] {
            assert_eq!(done(&run(folder.path(), options, stdin.as_bytes())), given);
        }
    }
    refused(&run(folder.path(), &[], b""), &["--prompt is empty"]);
    refused(&run(folder.path(), &["--prompt", "-"], b"ab\xff"), &["stdin", "not UTF-8", "byte 2"]);
    refused(&run(folder.path(), &[], &vec![b'a'; (16 << 20) + 1]), &["stdin", "16777216"]);
}

#[test]
fn a_conversation_is_written_by_the_models_template() {
    let template = "{% for m in messages %}{{ m.role | upper }}:\n{{ m.content }}\n\n{% endfor %}ROMEO:{{ bos_token }}";
    let files =
        [("chat_template.jinja", template.to_owned()), ("tokenizer_config.json", r#"{"bos_token": "x"}"#.to_owned())];
    let folder = model(&files);
    let written = "SYSTEM:\nBe kind.\n\nUSER:\nGood morrow\n\nROMEO:x";
    let plain = done(&run(folder.path(), &["--prompt", written, "--max-new-tokens", "12"], b""));
    let options = ["--chat", "--system", "Be kind.", "--prompt", "Good morrow", "--max-new-tokens", "12"];
    assert_eq!(done(&run(folder.path(), &options, b"")), plain[written.len()..]);

    let failing = model(&[("chat_template.jinja", "\n{{ raise_exception('no\nusers') }}".to_owned())]);
    refused(&run(failing.path(), &["--chat", "--prompt", "a"], b""), &["chat template, line 2", "no users"]);
    done(&run(failing.path(), &["--prompt", "a", "--max-new-tokens", "1"], b""));
    refused(&run(model(&[]).path(), &["--chat", "--prompt", "a"], b""), &["--chat", "no chat template"]);
    refused(&run(folder.path(), &["--system", "x", "--prompt", "a"], b""), &["--chat"]);
}

#[test]
fn a_text_may_be_longer_than_the_training_where_it_was_asked_for() {
    let folder = model(&[]);
    let asked = |context: &str, tokens: &str| {
        run(folder.path(), &["--prompt", "ROMEO:", "--max-new-tokens", tokens, "--context", context], b"")
    };
    refused(&asked("20", "40"), &["longer than the cache", "20 positions"]);
    refused(&asked("0", "1"), &["--context"]);
    let beyond = asked("300", "290");
    done(&beyond);
    let stderr = String::from_utf8(beyond.stderr).unwrap();
    assert!(stderr.starts_with("warning: ") && stderr.contains("300") && stderr.contains("256"), "{stderr}");
    let within = asked("256", "5");
    assert!(!String::from_utf8(within.stderr).unwrap().contains("warning"));

    let scaled = |scaling: Value| {
        let folder = model(&[]);
        let path = folder.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["rope_scaling"] = scaling;
        fs::write(path, config.to_string()).unwrap();
        run(folder.path(), &["--prompt", "a", "--max-new-tokens", "1", "--context", "300"], b"")
    };
    let linear = scaled(json!({"type": "linear", "factor": 2.0}));
    done(&linear);
    assert!(!String::from_utf8(linear.stderr).unwrap().contains("fall apart"));
    let factors = vec![1.0; 16];
    let long = json!({"type": "longrope", "original_max_position_embeddings": 256, "short_factor": factors,
        "long_factor": factors});
    refused(&scaled(long), &["--context 300", "longrope"]);
    refused(&scaled(json!({"type": "dynamic", "factor": 2.0})), &["--context 300", "dynamic"]);
}

#[test]
fn one_token_is_written_on_every_adapter() {
    let folder = model(&[]);
    let device = std::env::var("WGPU_BACKEND").unwrap_or_else(|_| "vulkan".to_owned());
    for adapter in ["cpu", "reference", &device] {
        let options = ["--prompt", "ROMEO:", "--max-new-tokens", "1", "--adapter", adapter];
        let text = done(&run(folder.path(), &options, b""));
        assert!(text.starts_with("ROMEO:") && text.len() > 7, "{text:?}");
    }
}
