//! `egmla generate`: text from a prompt.

use std::io::{ErrorKind, IsTerminal as _, Read as _, Write};
use std::time::{Duration, Instant};

use clap::Args;
use egmla::Storage;
use egmla::attention::MemoryReport;
use egmla::config::{DecoderAttention, DecoderConfig, RopeScaling};
use egmla::decoder::{ModelFolder, Sampler, SamplingOptions, TextStream};

use crate::adapter::{self, AdapterOption};
use crate::chat;
use crate::console;
use crate::engine::{Engine, EngineOptions};
use crate::failure::Failure;
use crate::interrupt;
use crate::options::{ModelOption, PathOptions};
use crate::stop::Stops;

/// Continues a prompt with a language model and streams the text.
#[derive(Args, Debug)]
pub struct GenerateArgs {
    /// The text to continue; `-`, or no --prompt where stdin is no terminal: what stdin holds, without its last line break
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// The prompt is a user's message, which the model's chat template writes; only the answer is shown
    #[arg(long)]
    pub chat: bool,
    /// A message of the system before it
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
    /// End before this text, which is not shown; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    #[command(flatten)]
    pub model: ModelOption,
    /// Most tokens to write, if the model does not end by itself; without this option 128, 1024 with --chat, or what there is room
    /// for
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<u32>,
    /// Most tokens of prompt and text together, in place of the model's max_position_embeddings
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub context: Option<u32>,
    /// Divides the logits; 0 always takes the most likely token
    #[arg(long, value_name = "X", default_value_t = 0.8, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Draw from the K most likely tokens only
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Draw from the most likely tokens that together reach this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Seed of the draws
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub adapter: AdapterOption,
    #[command(flatten)]
    pub path: PathOptions,
    /// Write one JSON object to stdout instead of the text
    #[arg(long)]
    pub json: bool,
    /// Tell where the time of a token goes, on stderr: host, device, wait, readback. Each step is then waited for by itself
    #[arg(long)]
    pub profile: bool,
}

/// The output of `--json`.
#[derive(Debug, serde::Serialize)]
struct Report<'a> {
    prompt: &'a str,
    text: &'a str,
    token_ids: &'a [u32],
    adapter: &'a str,
    storage: &'a str,
    decode: &'a str,
    prompt_tokens: usize,
    new_tokens: usize,
    /// `eos` (the model ended it), `stop` (a text of --stop) or `length`.
    finish_reason: &'a str,
    prompt_tokens_per_s: Option<f64>,
    decode_tokens_per_s: Option<f64>,
    memory: Option<MemoryReport>,
    cache_bytes_per_token: CacheBytes,
}

/// Bytes a cached token takes in all layers; the names of the fields are those of `--json`.
#[derive(Debug, serde::Serialize)]
pub struct CacheBytes {
    this: u64,
    mha: u64,
    /// Null where keys and values per head are cached.
    mla: Option<u64>,
    /// Latent width of the MLA that it is compared with.
    #[serde(rename = "mla_kv_lora_rank")]
    mla_rank: Option<u64>,
}

impl CacheBytes {
    /// The paper compares EG-MLA with MLA of four times the latent width (64 against 256); a plain MLA is its own.
    pub fn of(attention: &DecoderAttention, n_layer: u32, storage: Storage) -> Self {
        let bytes = |elements: u64| elements * u64::from(n_layer) * storage.bytes();
        let mla = match attention {
            DecoderAttention::Latent(config) => {
                let rank = u64::from(config.d_latent) * if config.gate.is_some() { 4 } else { 1 };
                Some((rank, bytes(rank + u64::from(config.d_rope))))
            }
            DecoderAttention::Heads(_) => None,
        };
        CacheBytes {
            this: bytes(attention.cache_elements().into()),
            mha: bytes(attention.mha_cache_elements().into()),
            mla: mla.map(|(_, bytes)| bytes),
            mla_rank: mla.map(|(rank, _)| rank),
        }
    }
}

/// Runs the command.
pub fn run(args: GenerateArgs) -> Result<(), Failure> {
    check(&args)?;
    interrupt::watch();
    let sampling =
        SamplingOptions { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let mut sampler = Sampler::new(sampling)?;
    let folder = ModelFolder::open(&args.model.folder()?)?;
    let prompt = prompt(&args)?;
    let prompt_ids = match args.chat {
        true => folder.encode_written(&chat::write(folder.rules(), args.system.as_deref(), &prompt)?)?,
        false => folder.encode(&prompt)?,
    };
    let (new_tokens, capacity) = room(&args, &folder, prompt_ids.len())?;

    let backend = adapter::open(&args.adapter)?;
    let started = Instant::now();
    let mut engine = Engine::new(
        &backend,
        &folder,
        &EngineOptions {
            storage: args.path.storage.into(),
            decode: args.path.decode.into(),
            gate_rows: args.path.gate_rows,
            capacity,
            max_tokens: prompt_ids.len() as u32,
            all_logits: false,
            profile: args.profile,
        },
    )?;
    console::note(format_args!("adapter: {}", backend.describe()));
    warm_up(&mut engine, &prompt_ids, capacity)?;
    let first_use = started.elapsed();

    let mut out = Output::new(!args.json);
    if !args.chat {
        out.write(&prompt)?;
    }
    let mut stops = Stops::new(&args.stop);
    let mut stream = TextStream::new(folder.tokenizer(), &prompt_ids)?;
    let (mut text, mut token_ids) = (String::new(), Vec::new());
    let started = Instant::now();
    let mut logits = engine.prefill(&prompt_ids)?;
    let prompt_time = started.elapsed();
    let (mut decode_time, mut steps) = (Duration::ZERO, 0);
    let mut finish_reason = "length";
    while out.open {
        let step = token_ids.len();
        let id = sampler.sample(&logits).map_err(|error| Failure::run(format!("step {step}: {error}")))?;
        if folder.eos_token_ids().contains(&id) {
            finish_reason = "eos";
            break;
        }
        token_ids.push(id);
        let (new, stopped) = stops.push(&stream.push(id)?);
        out.write(&new)?;
        text.push_str(&new);
        if stopped {
            finish_reason = "stop";
            break;
        }
        if token_ids.len() as u64 >= u64::from(new_tokens) {
            break;
        }
        if interrupt::asked() {
            // The text so far stays, on a line of its own.
            out.write(&(rest_of(stops, stream)? + "\n"))?;
            return Err(Failure::Interrupted);
        }
        let started = Instant::now();
        logits = engine.step(id)?;
        decode_time += started.elapsed();
        steps += 1;
    }
    // Behind a stop there is nothing to show.
    let rest = if finish_reason == "stop" { String::new() } else { rest_of(stops, stream)? };
    text.push_str(&rest);
    out.write(&(rest + "\n"))?;

    let rate = |tokens: usize, time: Duration| (tokens > 0).then(|| tokens as f64 / time.as_secs_f64().max(1e-9));
    let adapter = backend.describe();
    let report = Report {
        prompt: &prompt,
        text: &text,
        token_ids: &token_ids,
        adapter: &adapter,
        storage: engine.storage(),
        decode: engine.decode(),
        prompt_tokens: prompt_ids.len(),
        new_tokens: token_ids.len(),
        finish_reason,
        prompt_tokens_per_s: rate(prompt_ids.len(), prompt_time),
        // The first new token comes out of the prompt's own step.
        decode_tokens_per_s: rate(steps, decode_time),
        memory: engine.memory(),
        cache_bytes_per_token: CacheBytes::of(
            &folder.config().attention,
            folder.config().n_layer,
            engine.cache_storage(),
        ),
    };
    tell(&report, prompt_ids.len() + steps, first_use);
    if args.profile {
        match engine.profile() {
            Some(profile) => profile.lines().into_iter().for_each(console::note),
            None => console::note("no profile: the CPU has no device"),
        }
    }
    if args.json {
        let json = serde_json::to_string(&report).map_err(Failure::run)?;
        Output::new(true).write(&(json + "\n"))?;
    }
    Ok(())
}

fn check(args: &GenerateArgs) -> Result<(), Failure> {
    if args.stop.iter().any(String::is_empty) {
        return Err(Failure::usage("--stop is empty: it would end every text before it begins"));
    }
    if args.max_new_tokens == Some(0) {
        return Err(Failure::usage("--max-new-tokens is 0, must be at least 1"));
    }
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        return Err(Failure::usage(format!("--temperature is {}, must be 0 or a number above it", args.temperature)));
    }
    if args.top_k == Some(0) {
        return Err(Failure::usage("--top-k is 0, must be at least 1"));
    }
    match args.top_p {
        Some(top_p) if !(top_p > 0.0 && top_p <= 1.0) => {
            Err(Failure::usage(format!("--top-p is {top_p}, must be above 0 and at most 1")))
        }
        _ => Ok(()),
    }
}

/// Most bytes of a prompt from stdin.
const MOST_PROMPT: u64 = 16 << 20;

/// The text of `--prompt`, or of stdin.
fn prompt(args: &GenerateArgs) -> Result<String, Failure> {
    let given = match args.prompt.as_deref() {
        Some(text) if text != "-" => text.to_owned(),
        None if std::io::stdin().is_terminal() => {
            return Err(Failure::usage(
                "--prompt is missing, and stdin is a terminal: there must be a text to continue",
            ));
        }
        _ => from_stdin()?,
    };
    if given.is_empty() {
        return Err(Failure::usage("--prompt is empty: there must be a text to continue"));
    }
    Ok(given)
}

/// What stdin holds, without its last line break, which is the shell's.
fn from_stdin() -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let read = std::io::stdin().lock().take(MOST_PROMPT + 1).read_to_end(&mut bytes);
    read.map_err(|error| Failure::usage(format!("stdin: {error}")))?;
    if bytes.len() as u64 > MOST_PROMPT {
        return Err(Failure::usage(format!("stdin: more than {MOST_PROMPT} bytes")));
    }
    let text = String::from_utf8(bytes);
    let mut text = text.map_err(|error| {
        Failure::usage(format!("stdin: not UTF-8 from byte {} on", error.utf8_error().valid_up_to()))
    })?;
    if text.ends_with('\n') {
        text.pop();
        text.truncate(text.strip_suffix('\r').map_or(text.len(), str::len));
    }
    Ok(text)
}

/// What was held back at the end of a text that no stop ended.
fn rest_of(mut stops: Stops<'_>, stream: TextStream<'_>) -> Result<String, Failure> {
    let (mut rest, stopped) = stops.push(&stream.finish()?);
    if !stopped {
        rest += &stops.finish();
    }
    Ok(rest)
}

/// Tokens to write without `--max-new-tokens`: of a model that goes on for ever, and of an answer.
const NEW_TOKENS: [u32; 2] = [128, 1024];

/// Most positions of a sequence. Beyond those that the configuration names the frequencies of the rotary embedding say how, or the
/// model was never shown what comes.
fn positions(args: &GenerateArgs, config: &DecoderConfig) -> Result<u32, Failure> {
    let trained = config.max_position_embeddings;
    let Some(asked) = args.context.filter(|&asked| asked > trained) else {
        return Ok(args.context.unwrap_or(trained));
    };
    let rope = config.attention.rope();
    let beyond = format!("--context {asked} is beyond the {trained} positions of the configuration");
    match rope.scaling {
        RopeScaling::LongRope { .. } => {
            return Err(Failure::usage(format!(
                "{beyond}, where longrope takes other factors, which are not computed"
            )));
        }
        RopeScaling::Dynamic { .. } => {
            return Err(Failure::usage(format!(
                "{beyond}, where dynamic scaling takes frequencies by the length of the text, which are not computed"
            )));
        }
        RopeScaling::None if rope.rotate => {
            tracing::warn!("{beyond}, and its rotary embedding is not scaled: expect the text to fall apart there");
        }
        _ => tracing::warn!("{beyond}: the text may get worse there"),
    }
    Ok(asked)
}

/// Tokens to write, and tokens that the cache must hold.
fn room(args: &GenerateArgs, folder: &ModelFolder, prompt_tokens: usize) -> Result<(u32, u32), Failure> {
    if prompt_tokens == 0 {
        return Err(Failure::usage("--prompt has no token in this model's vocabulary"));
    }
    let limit = positions(args, folder.config())?;
    // The last new token is written, never fed.
    let most = (u64::from(limit) + 1).saturating_sub(prompt_tokens as u64);
    let usual = u64::from(NEW_TOKENS[usize::from(args.chat)]);
    let wanted = args.max_new_tokens.map_or(usual.min(most.max(1)), u64::from);
    if wanted > most {
        return Err(Failure::usage(format!(
            "a sequence longer than the cache: {prompt_tokens} prompt tokens and {wanted} new ones (--max-new-tokens) exceed \
             {limit} positions (--context, else the model's)"
        )));
    }
    // Both are within `limit + 1 - prompt_tokens`.
    Ok((wanted as u32, (prompt_tokens as u64 + wanted - 1) as u32))
}

/// Runs the kernels of a prompt's step and of a decode step once, so that compiling them does not count as speed.
fn warm_up(engine: &mut Engine<'_>, prompt_ids: &[u32], capacity: u32) -> Result<(), Failure> {
    if let Engine::Gpu { .. } = engine {
        let short = prompt_ids.len().min(32);
        engine.prefill(&prompt_ids[..short])?;
        // One new token comes out of the prompt's own step.
        if short < capacity as usize {
            engine.step(prompt_ids[0])?;
        }
        engine.reset();
    }
    Ok(())
}

/// Figures for the user, on stderr.
fn tell(report: &Report<'_>, cached: usize, first_use: Duration) {
    let rate = |rate: Option<f64>| rate.map_or("no step".to_owned(), |rate| format!("{rate:.1} tokens/s"));
    let cached = cached as u64;
    let cache = &report.cache_bytes_per_token;
    let less = |other: u64| 100.0 * (1.0 - cache.this as f64 / other as f64);
    console::note(format_args!("storage {}, decode path {}", report.storage, report.decode));
    console::note(format_args!("first use: {:.2} s (weights and pipelines made ready)", first_use.as_secs_f64()));
    console::note(format_args!("prompt: {} tokens, {}", report.prompt_tokens, rate(report.prompt_tokens_per_s)));
    let ended = match report.finish_reason {
        "eos" => ", ended by the model",
        "stop" => ", ended by --stop",
        _ => "",
    };
    console::note(format_args!("decode: {} tokens, {}{ended}", report.new_tokens, rate(report.decode_tokens_per_s)));
    console::note(format_args!("cache of {cached} tokens: {} bytes, {} a token", cached * cache.this, cache.this));
    console::note(format_args!(
        "  MHA of the same shape: {} bytes, {} a token ({:.1} % less here)",
        cached * cache.mha,
        cache.mha,
        less(cache.mha)
    ));
    if let (Some(rank), Some(mla)) = (cache.mla_rank, cache.mla) {
        console::note(format_args!(
            "  MLA with kv_lora_rank {rank}: {} bytes, {mla} a token ({:.1} % less here)",
            cached * mla,
            less(mla)
        ));
    }
    match &report.memory {
        None => console::note(
            "  (the figures are a device's; on the CPU a gate at `up_projected`, and the reference always, keep keys and values)",
        ),
        Some(memory) => {
            for (name, bytes) in memory.lines() {
                console::note(format_args!("memory, {name}: {bytes} bytes"));
            }
        }
    }
}

/// stdout, until the reader goes away.
struct Output {
    open: bool,
    wanted: bool,
}

impl Output {
    fn new(wanted: bool) -> Self {
        Output { open: true, wanted }
    }

    /// Writes and flushes, so that the text is seen as it comes.
    fn write(&mut self, text: &str) -> Result<(), Failure> {
        if !self.wanted || !self.open {
            return Ok(());
        }
        let mut stdout = std::io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.open = false;
                Ok(())
            }
            Err(error) => Err(Failure::run(format!("stdout: {error}"))),
        }
    }
}
