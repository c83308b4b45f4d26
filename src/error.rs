//! Errors that carry the number that did not fit.

use std::path::PathBuf;

/// What every fallible call of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, each with the name and the number a user needs to act on it.
///
/// Every message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration key holds a value that cannot be used, contradicts another, or is not known.
    #[error("config key `{key}`: {problem}")]
    Config {
        /// The checkpoint key, as it stands in `config.json`.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor of a checkpoint that does not fit its configuration, or the storage that was asked for.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// A kernel that cannot run.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A buffer that a kernel, or the layer by its argument's name, cannot be given.
    #[error(transparent)]
    Buffer(#[from] BufferError),
    /// A device limit is too small.
    #[error("{what} needs {needed}, but this device allows {allowed} ({limit})")]
    Limit {
        /// What is being planned or allocated.
        what: String,
        /// What it needs.
        needed: u64,
        /// What the device allows.
        allowed: u64,
        /// Name of the limit in `wgpu::Limits`.
        limit: &'static str,
    },
    /// An argument that is out of range, or does not fit another.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// The cache has no room for the new tokens of a sequence. The cache is unchanged.
    #[error("cache full: sequence {sequence} holds {length} tokens, {added} more exceed its capacity of {capacity}")]
    CacheFull {
        /// Index of the sequence in the batch.
        sequence: usize,
        /// Tokens that it holds.
        length: u32,
        /// Tokens that were to be added.
        added: u64,
        /// Tokens that fit.
        capacity: u32,
    },
    /// The step was planned on another cache, or the cache has changed since.
    #[error("this step was prepared for another state of the cache: prepare it again")]
    StaleStep,
    /// A combination that is defined but that this version does not compute.
    #[error("{what} is not supported: {instead}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What to do instead.
        instead: &'static str,
    },
    /// What the device, its driver or wgpu reports: `what` was being done, and `message` is wgpu's own words on one line.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Data that cannot be read or used: a file's content, or a result.
    #[error(transparent)]
    Data(#[from] DataError),
    /// An error in the content of a file.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        source: Box<Error>,
    },
}

/// A tensor of a checkpoint that does not fit its configuration, or the storage that was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// The configuration asks for a tensor that the checkpoint does not hold.
    #[error("tensor `{name}` is missing (expected shape {expected:?})")]
    Missing {
        /// Full name in the checkpoint.
        name: String,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// The checkpoint holds a tensor that the configuration has no place for.
    #[error("tensor `{name}` of shape {found:?} is not expected by this configuration")]
    Extra {
        /// Full name in the checkpoint.
        name: String,
        /// Its shape.
        found: Vec<usize>,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Full name in the checkpoint.
        name: String,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor has an element type that is not read here.
    #[error("tensor `{name}` has element type {found}, expected {expected}")]
    Type {
        /// Full name in the checkpoint.
        name: String,
        /// The element types that are accepted.
        expected: &'static str,
        /// The type in the file.
        found: String,
    },
    /// A tensor is there in a form of quantised weights that is not read.
    #[error(
        "tensor `{name}`: `{found}` stands for it, of weights quantised by {method}, which are not read; take f32, f16, bf16 or fp8 (e4m3 with _scale_inv)"
    )]
    Quantised {
        /// Full name of the tensor that was asked for.
        name: String,
        /// The tensor that tells.
        found: String,
        /// The method.
        method: &'static str,
    },
    /// A weight does not fit the storage type that was asked for.
    #[error("tensor `{name}`: element {index} is {value}, beyond ±65504, the range of f16 storage; use f32 storage")]
    OutOfF16Range {
        /// Full name in the checkpoint.
        name: String,
        /// Row-major index of the element.
        index: usize,
        /// Its value.
        value: f32,
    },
}

/// A kernel that cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A kernel was asked for something that its shader cannot do.
    #[error("{kernel}: {problem}")]
    Problem {
        /// Stem of the kernel.
        kernel: &'static str,
        /// What does not fit, with the number.
        problem: String,
    },
    /// A kernel needs features that the device was not opened with.
    #[error("{kernel}: this device was opened without {features}")]
    Feature {
        /// Stem of the kernel.
        kernel: &'static str,
        /// Names of the missing features.
        features: String,
    },
}

/// A buffer that a kernel, or the layer by its argument's name, cannot be given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BufferError {
    /// A buffer handed to a kernel is smaller than the problem.
    #[error("{kernel}: buffer `{binding}` has {found} bytes, needs {needed}")]
    Size {
        /// Stem of the kernel.
        kernel: &'static str,
        /// Name of the binding.
        binding: &'static str,
        /// Bytes that the problem needs.
        needed: u64,
        /// Bytes in the region that was given.
        found: u64,
    },
    /// A buffer was made without `BufferUsages::STORAGE`: no shader can be given it.
    #[error("{kernel}: buffer `{binding}` was made without BufferUsages::STORAGE")]
    Usage {
        /// Stem of the kernel.
        kernel: &'static str,
        /// Name of the binding.
        binding: &'static str,
    },
    /// A region's offset does not meet the device's alignment.
    #[error("{kernel}: buffer `{binding}` begins at byte {offset}, not a multiple of {alignment}")]
    Offset {
        /// Stem of the kernel.
        kernel: &'static str,
        /// Name of the binding.
        binding: &'static str,
        /// Byte offset of the region.
        offset: u64,
        /// `min_storage_buffer_offset_alignment` of the device.
        alignment: u64,
    },
    /// One buffer is bound for reading and for writing in one dispatch: an error in wgpu, even for disjoint ranges.
    #[error("{kernel}: `{first}` and `{second}` are the same buffer and one of them is written")]
    Aliased {
        /// Stem of the kernel.
        kernel: &'static str,
        /// One binding.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
}

/// An argument that is out of range, or does not fit another.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArgumentError {
    /// A sequence index or length is outside of the cache.
    #[error("{what} is {found}, must be at most {limit}")]
    OutOfRange {
        /// What was given.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The largest value that is accepted.
        limit: u64,
    },
    /// Two counts that must agree do not.
    #[error("{what}: expected {expected}, found {found}")]
    Count {
        /// What is counted.
        what: &'static str,
        /// The count that the other arguments imply.
        expected: u64,
        /// The count that was given.
        found: u64,
    },
    /// A token id is outside of the vocabulary.
    #[error("token id {id} at position {index} is outside of the vocabulary of {vocab_size}")]
    TokenId {
        /// Index in the token list that was given.
        index: usize,
        /// The id.
        id: u64,
        /// Rows of the table.
        vocab_size: u32,
    },
    /// There is nothing to work on.
    #[error("{what} is empty")]
    Empty {
        /// What is empty.
        what: &'static str,
    },
    /// Two objects that must share a device do not. Nothing was recorded.
    #[error("{what} is of another device than the {than}: make both with the kernels of one device")]
    OtherDevice {
        /// What was given.
        what: &'static str,
        /// What it does not fit.
        than: &'static str,
    },
}

/// What the device, its driver or wgpu reports: `what` was being done, and `message` is wgpu's own words on one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device is lost: destroyed, reset, unplugged, or out of memory where wgpu does not survive it. Whatever lives on it is
    /// gone; the host's state, as a cache's lengths, still tells what there was.
    #[error(
        "GPU: {what}: the device is lost ({message}); open a new one, make kernels, layers and caches on it, and feed them again"
    )]
    Lost {
        /// What was being done.
        what: String,
        /// What is known of the cause, on one line.
        message: String,
    },
    /// The device has no memory left for it. Nothing of what was asked for exists; what was made before goes on.
    #[error(
        "GPU: {what}: out of memory ({message}); ask for less (capacity, batch, f16 storage), or free buffers, and try again"
    )]
    OutOfMemory {
        /// What was being allocated.
        what: String,
        /// wgpu's own words, on one line.
        message: String,
    },
    /// wgpu's validation refused what reached it: a buffer of another device in a region, or a defect of this crate.
    #[error(
        "GPU: {what}: refused: {message}; if all that was given belongs to this device, this is a defect to report"
    )]
    Validation {
        /// What was being done.
        what: String,
        /// wgpu's own words, on one line.
        message: String,
    },
    /// The device had not finished in time. It may yet: nothing is lost by waiting again.
    #[error("GPU: {what}: not done within {seconds} s; wait longer, submit less at once, or open a new device")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long, in seconds.
        seconds: f64,
    },
    /// The driver, or wgpu's use of it, failed for a reason of its own.
    #[error("GPU: {what}: {message}; try again, with a newer driver or on another adapter")]
    Driver {
        /// What was being done.
        what: String,
        /// wgpu's own words, on one line.
        message: String,
    },
}

/// Data that cannot be read or used: a file's content, or a result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The bytes are not a whole safetensors file.
    #[error("not a valid safetensors file: {0}")]
    Safetensors(String),
    /// An index of shards, or a folder of models, that does not lead to whole files.
    #[error("index of shards: {0}")]
    Index(String),
    /// A checkpoint has no such layer, or another one than is computed.
    #[error("{0}")]
    Layer(String),
    /// The bytes are not a whole GGUF file of a version that is read.
    #[error("not a valid GGUF file: {0}")]
    Gguf(String),
    /// The text of a configuration file is not the JSON that is expected.
    #[error("config is not valid: {0}")]
    Json(#[from] serde_json::Error),
    /// A text file is not UTF-8.
    #[error("not UTF-8 text (byte {byte})")]
    Utf8 {
        /// The first byte that is not.
        byte: usize,
    },
    /// Tensors of an input file do not fit the layer, or each other.
    #[error("{0}")]
    Input(String),
    /// The tokenizer could not be read or could not encode.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A result is NaN or infinite.
    #[error("{what}: element {index} is {value}, must be finite")]
    NonFinite {
        /// What was computed.
        what: &'static str,
        /// Row-major index of the first such element.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// The operating system refused a file.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        DataError::Json(error).into()
    }
}

impl Error {
    pub(crate) fn config(key: &str, problem: impl Into<String>) -> Self {
        Error::Config { key: key.to_owned(), problem: problem.into() }
    }

    pub(crate) fn problem(kernel: &'static str, problem: impl Into<String>) -> Self {
        KernelError::Problem { kernel, problem: problem.into() }.into()
    }

    /// A failure of the driver, in wgpu's words.
    pub(crate) fn device(what: impl Into<String>, message: impl std::fmt::Display) -> Self {
        DeviceError::Driver { what: what.into(), message: one_line(message) }.into()
    }

    /// What an error scope, or the handler of errors outside of all scopes, was told.
    pub(crate) fn wgpu(what: impl Into<String>, error: &wgpu::Error) -> Self {
        let (what, message) = (what.into(), one_line(error));
        match error {
            // Its own words are the variant's; what the allocator said stands behind them.
            wgpu::Error::OutOfMemory { source } => DeviceError::OutOfMemory { what, message: one_line(source) }.into(),
            wgpu::Error::Validation { .. } => DeviceError::Validation { what, message }.into(),
            wgpu::Error::Internal { .. } => DeviceError::Driver { what, message }.into(),
        }
    }

    /// Whether the device is at fault, or what wgpu makes of it, and not what was asked of it.
    pub fn is_of_device(&self) -> bool {
        match self {
            Error::Device(_) => true,
            Error::File { source, .. } => source.is_of_device(),
            _ => false,
        }
    }

    /// Whether the device is gone, or does not answer: every later call on it would fail, too.
    pub fn is_loss(&self) -> bool {
        match self {
            Error::Device(error) => matches!(error, DeviceError::Lost { .. } | DeviceError::Timeout { .. }),
            Error::File { source, .. } => source.is_loss(),
            _ => false,
        }
    }

    /// The same error, with the file it was found in.
    pub fn in_file(self, path: impl Into<PathBuf>) -> Self {
        Error::File { path: path.into(), source: Box::new(self) }
    }
}

/// wgpu's messages span lines; ours are one.
pub(crate) fn one_line(message: impl std::fmt::Display) -> String {
    message.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}
