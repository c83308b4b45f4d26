//! Rows of a sequence on the move: to another sequence, to another cache, to bytes and back.

use std::borrow::Cow;
use std::collections::HashMap;

use bytemuck::cast_slice;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use super::batch::Batch;
use super::cache::{CacheOptions, LatentCache};
use super::kv_cache::KvCache;
use super::lists::Lists;
use super::parts::{Segment, segments};
use super::step::identity;
use crate::config::{AttentionConfig, GqaConfig};
use crate::device::{Kernels, Region};
use crate::error::{ArgumentError, DataError, Error, Result};
use crate::files::tensors;
use crate::kernels::{cache_copy, cache_move, word_scatter};
use crate::recording::Recording;
use crate::storage::{Storage, words};

/// The format of saved sequences.
const VERSION: u32 = 1;

/// The key of the header under which a saved sequence describes itself.
const DESCRIPTION: &str = "egmla.sequence";

/// What a saved sequence says of itself.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Description {
    version: u32,
    attention: serde_json::Value,
    storage: Storage,
    n_layer: u32,
    length: u32,
    /// Of every tensor's bytes, in the order of [`Rows::fields`], then of the token ids.
    crc32: u32,
}

/// What a layer's cache has of every token: rows of words, sequence after sequence.
struct Field<'a> {
    name: String,
    /// Of the parts of the cache.
    regions: Vec<&'a Region>,
    part_rows: u32,
    dtype: Dtype,
    /// Elements of a row, with its padding.
    width: u32,
    row_words: u32,
}

/// Rows of a field that stand together in a buffer.
#[derive(Clone)]
struct Run {
    region: Region,
    /// First word within it.
    word: u32,
    rows: u32,
}

impl<'a> Field<'a> {
    /// The rows of a sequence, part by part.
    fn runs(&self, first_row: u32, rows: u32) -> impl Iterator<Item = Run> + use<'a, '_> {
        segments(first_row, rows, self.part_rows).filter_map(|Segment { part, first_row, rows }| {
            let region = (*self.regions.get(part as usize)?).clone();
            // Every part is within a binding, so word indices fit 32 bits.
            Some(Run { region, word: first_row * self.row_words, rows: rows.end - rows.start })
        })
    }

    /// The same as regions; one if there are no rows.
    fn regions(&self, first_row: u32, rows: u32) -> Vec<Region> {
        let region = |run: Run| {
            Region::new(&run.region.buffer, run.region.offset + words(run.word.into()), self.bytes(run.rows))
        };
        let none = || self.regions.first().map(|of| Region::new(&of.buffer, of.offset, 0));
        let regions: Vec<_> = self.runs(first_row, rows).map(region).collect();
        if regions.is_empty() { none().into_iter().collect() } else { regions }
    }

    fn bytes(&self, rows: u32) -> u64 {
        words(u64::from(rows) * u64::from(self.row_words))
    }
}

/// Pairs of runs of equal length that two lists of runs are cut into.
fn paired(from: &[Run], to: &[Run], row_words: u32) -> Vec<(Run, Run)> {
    let (mut from, mut to) = (from.to_vec(), to.to_vec());
    let mut pairs = Vec::new();
    let (mut source, mut sink) = (0, 0);
    while let (Some(a), Some(b)) = (from.get_mut(source), to.get_mut(sink)) {
        let rows = a.rows.min(b.rows);
        pairs.push((Run { rows, ..a.clone() }, Run { rows, ..b.clone() }));
        for (run, next) in [(a, &mut source), (b, &mut sink)] {
            run.rows -= rows;
            run.word += rows * row_words;
            *next += usize::from(run.rows == 0);
        }
    }
    pairs
}

fn refuse<T>(problem: String) -> Result<T> {
    Err(DataError::Input(format!("saved sequence: {problem}")).into())
}

/// A cache whose sequences move.
trait Rows: Sized {
    type Config: PartialEq + Serialize;

    /// Every field of every layer that has rows.
    fn fields(&self) -> Vec<Field<'_>>;
    fn batch(&self) -> &Batch;
    fn batch_mut(&mut self) -> &mut Batch;
    /// Token ids and where they stand, where the gate needs them.
    fn lists(&self) -> Option<&Lists> {
        None
    }
    fn lists_mut(&mut self) -> Option<&mut Lists> {
        None
    }
    fn extents(&self) -> CacheOptions;
    fn device(&self) -> &Kernels;
    /// The layers' configuration.
    fn attention(&self) -> &Self::Config;
    /// Ids are below this.
    fn vocab_size(&self) -> u32 {
        u32::MAX
    }
    /// Marks a change: steps that were prepared before are stale.
    fn outdate(&mut self);
    /// An empty cache of other extents for the same layers.
    fn empty(&self, options: CacheOptions) -> Result<Self>;

    /// First cache row of a sequence.
    fn first_row(&self, sequence: usize) -> u32 {
        sequence as u32 * self.batch().pitch
    }

    fn copy(&mut self, recording: &mut Recording, from: usize, to: usize) -> Result<()> {
        recording.kernels().same_device(self.device(), "the cache", "recording")?;
        self.batch().check_sequence(from)?;
        self.batch().check_sequence(to)?;
        if from == to {
            return Ok(());
        }
        self.outdate();
        let mark = recording.mark();
        self.record_copy(recording, from, to).inspect_err(|_| recording.rewind(mark))?;
        if let Some(lists) = self.lists_mut() {
            lists.copy(from as u32, to as u32);
        }
        self.batch_mut().lengths[to] = self.batch().lengths[from];
        Ok(())
    }

    fn record_copy(&self, recording: &mut Recording, from: usize, to: usize) -> Result<()> {
        let length = self.batch().lengths[from];
        let copy = |recording: &mut Recording, region: &Region, words: u32, from_word: u32, to_word: u32| {
            let op = cache_copy::CacheCopy { words, from_word, to_word };
            recording.add_own(&op, cache_copy::Args { cache: region })
        };
        for field in self.fields() {
            let runs = |sequence| field.runs(self.first_row(sequence), length).collect::<Vec<_>>();
            for (from, to) in paired(&runs(from), &runs(to), field.row_words) {
                let words = to.rows * field.row_words;
                if from.region.buffer == to.region.buffer {
                    copy(recording, &from.region, words, from.word, to.word)?;
                } else {
                    record_run(recording, (from, to), words)?;
                }
            }
        }
        let Some(lists) = self.lists() else { return Ok(()) };
        for (from_word, to_word, words) in lists.copies(from as u32, to as u32, length) {
            copy(recording, &Region::from(&lists.buffer), words, from_word, to_word)?;
        }
        Ok(())
    }

    fn copy_from(&mut self, recording: &mut Recording, to: usize, source: &Self, from: usize) -> Result<()> {
        recording.kernels().same_device(source.device(), "the cache to copy from", "recording")?;
        source.batch().check_sequence(from)?;
        let alike = |cache: &Self| (cache.extents().storage, cache.extents().n_layer);
        if source.attention() != self.attention() || alike(source) != alike(self) {
            let problem = "the cache to copy from is of another configuration, storage or number of layers";
            return Err(Error::config("(attention)", problem));
        }
        let length = source.batch().lengths[from];
        let ids = source.lists().map_or(&[][..], |lists| lists.ids_of(from, length));
        let fields = source.fields();
        let sources: Vec<Vec<_>> =
            fields.iter().map(|field| field.runs(source.first_row(from), length).collect()).collect();
        self.receive(recording, to, length, ids, &sources)
    }

    /// Refuses a sequence that is not there, or has no room for `length` tokens in all.
    fn check_room(&self, sequence: usize, length: u32) -> Result<()> {
        self.batch().check_sequence(sequence)?;
        let capacity = self.extents().capacity;
        match length <= capacity {
            true => Ok(()),
            false => Err(Error::CacheFull { sequence, length: 0, added: length.into(), capacity }),
        }
    }

    /// Makes a sequence `length` rows of other buffers, in the order of [`Rows::fields`].
    fn receive(
        &mut self,
        recording: &mut Recording,
        to: usize,
        length: u32,
        ids: &[u32],
        sources: &[Vec<Run>],
    ) -> Result<()> {
        recording.kernels().same_device(self.device(), "the cache", "recording")?;
        self.check_room(to, length)?;
        self.outdate();
        let (mark, before) = (recording.mark(), self.lists().cloned());
        let recorded = self.record_rows(recording, to, length, sources).and_then(|()| match self.lists_mut() {
            Some(lists) => record_lists(lists, recording, to as u32, ids),
            None => Ok(()),
        });
        match recorded {
            Ok(()) => self.batch_mut().lengths[to] = length,
            Err(_) => {
                recording.rewind(mark);
                if let (Some(lists), Some(before)) = (self.lists_mut(), before) {
                    *lists = before;
                }
            }
        }
        recorded
    }

    fn record_rows(&self, recording: &mut Recording, to: usize, length: u32, sources: &[Vec<Run>]) -> Result<()> {
        for (field, source) in self.fields().iter().zip(sources) {
            let sink: Vec<_> = field.runs(self.first_row(to), length).collect();
            for (from, to) in paired(source, &sink, field.row_words) {
                let words = to.rows * field.row_words;
                record_run(recording, (from, to), words)?;
            }
        }
        Ok(())
    }

    fn enlarge(&mut self, recording: &mut Recording, capacity: u32) -> Result<()> {
        let options = self.extents();
        if capacity < options.capacity {
            let (what, found, limit) = ("capacity that a cache is grown from", options.capacity, capacity);
            return Err(ArgumentError::OutOfRange { what, found: found.into(), limit: limit.into() }.into());
        }
        let options = CacheOptions { capacity, ..options };
        let mut larger = self.empty(options)?;
        let mark = recording.mark();
        for sequence in 0..self.batch().lengths.len() {
            let copied = larger.copy_from(recording, sequence, self, sequence);
            copied.inspect_err(|_| recording.rewind(mark))?;
        }
        *self = larger;
        Ok(())
    }

    fn regions(&self, sequence: usize) -> Result<Vec<Region>> {
        self.batch().check_sequence(sequence)?;
        let (first_row, length) = (self.first_row(sequence), self.batch().lengths[sequence]);
        Ok(self.fields().iter().flat_map(|field| field.regions(first_row, length)).collect())
    }

    fn save(&self, sequence: usize, rows: &[Vec<u8>]) -> Result<Vec<u8>> {
        self.batch().check_sequence(sequence)?;
        let (fields, length) = (self.fields(), self.batch().lengths[sequence]);
        let count = |what, expected, found| Err(ArgumentError::Count { what, expected, found }.into());
        let regions: Vec<_> = fields.iter().map(|field| field.regions(self.first_row(sequence), length)).collect();
        let expected: usize = regions.iter().map(Vec::len).sum();
        if rows.len() != expected {
            return count("regions of a saved sequence", expected as u64, rows.len() as u64);
        }
        let mut crc32 = crc32fast::Hasher::new();
        let mut tensors = Vec::new();
        let mut rest = rows;
        for of_field in &regions {
            let (parts, others) = rest.split_at(of_field.len());
            rest = others;
            for (region, rows) in of_field.iter().zip(parts) {
                if region.size != rows.len() as u64 {
                    return count("bytes of a region of a saved sequence", region.size, rows.len() as u64);
                }
                crc32.update(rows);
            }
            tensors.push(match parts {
                [whole] => Cow::Borrowed(&whole[..]),
                parts => Cow::Owned(parts.concat()),
            });
        }
        let mut views = Vec::new();
        for (field, rows) in fields.iter().zip(&tensors) {
            views.push((field.name.clone(), field.dtype, vec![length as usize, field.width as usize], &rows[..]));
        }
        if let Some(lists) = self.lists() {
            let ids = cast_slice(lists.ids_of(sequence, length));
            crc32.update(ids);
            views.push(("token_ids".to_owned(), Dtype::U32, vec![length as usize], ids));
        }
        let description = Description { crc32: crc32.finalize(), ..self.description(length)? };
        let header = HashMap::from([(DESCRIPTION.to_owned(), serde_json::to_string(&description)?)]);
        let invalid = |error: safetensors::SafeTensorError| Error::from(DataError::Safetensors(error.to_string()));
        let view = |(name, dtype, shape, bytes)| Ok((name, TensorView::new(dtype, shape, bytes).map_err(invalid)?));
        let views = views.into_iter().map(view).collect::<Result<Vec<_>>>()?;
        safetensors::serialize(views, Some(header)).map_err(invalid)
    }

    fn description(&self, length: u32) -> Result<Description> {
        let CacheOptions { storage, n_layer, .. } = self.extents();
        let attention = serde_json::to_value(self.attention())?;
        Ok(Description { version: VERSION, attention, storage, n_layer, length, crc32: 0 })
    }

    fn restore(&mut self, recording: &mut Recording, sequence: usize, bytes: &[u8]) -> Result<()> {
        let saved = tensors(bytes)?;
        let (length, crc32) = self.check_description(bytes)?;
        let fields = self.fields();
        let mut hasher = crc32fast::Hasher::new();
        let mut take = |name: &str, dtype: Dtype, shape: &[usize]| {
            let data = take_tensor(&saved, name, dtype, shape)?;
            hasher.update(data);
            Ok::<_, Error>(data)
        };
        let rows = fields
            .iter()
            .map(|field| take(&field.name, field.dtype, &[length as usize, field.width as usize]))
            .collect::<Result<Vec<_>>>()?;
        let ids: Vec<u32> = match self.lists() {
            Some(_) => bytemuck::pod_collect_to_vec(take("token_ids", Dtype::U32, &[length as usize])?),
            None => Vec::new(),
        };
        let expected = rows.len() + usize::from(self.lists().is_some());
        if saved.len() != expected {
            return refuse(format!("{} tensors, expected {expected}", saved.len()));
        }
        if hasher.finalize() != crc32 {
            return refuse("its bytes have changed since it was saved (the checksum differs)".to_owned());
        }
        let vocab_size = self.vocab_size();
        if let Some(index) = ids.iter().position(|&id| id >= vocab_size) {
            return Err(ArgumentError::TokenId { index, id: ids[index].into(), vocab_size }.into());
        }
        // Refused before anything is allocated.
        self.check_room(sequence, length)?;
        let sources = rows.iter().zip(&fields).map(|(rows, field)| {
            let mut rest = *rows;
            let upload = |run: Run| {
                let (own, others) = rest.split_at(rest.len().min(field.bytes(run.rows) as usize));
                rest = others;
                let buffer = self.device().upload(&format!("egmla.restored.{}", field.name), own)?;
                Ok(Run { region: Region::from(&buffer), word: 0, rows: run.rows })
            };
            // As they will stand: no buffer is larger than a part.
            field.runs(self.first_row(sequence), length).map(upload).collect::<Result<Vec<_>>>()
        });
        let sources = sources.collect::<Result<Vec<_>>>()?;
        self.receive(recording, sequence, length, &ids, &sources)
    }

    /// Length and checksum of a saved sequence that this cache can hold.
    fn check_description(&self, bytes: &[u8]) -> Result<(u32, u32)> {
        let (_, header) =
            SafeTensors::read_metadata(bytes).map_err(|error| DataError::Safetensors(error.to_string()))?;
        let Some(text) = header.metadata().as_ref().and_then(|texts| texts.get(DESCRIPTION)) else {
            return refuse(format!("the header has no `{DESCRIPTION}`"));
        };
        let value: serde_json::Value = serde_json::from_str(text)?;
        let version = value.get("version").unwrap_or(&serde_json::Value::Null);
        if *version != VERSION {
            return refuse(format!("version {version}, this release reads {VERSION}"));
        }
        let found: Description = serde_json::from_value(value)?;
        let expected = Description { crc32: found.crc32, ..self.description(found.length)? };
        if found.storage != expected.storage || found.n_layer != expected.n_layer {
            let words = |of: &Description| format!("{} layers in {}", of.n_layer, of.storage.name());
            return refuse(format!("{}, the cache has {}", words(&found), words(&expected)));
        }
        if found.attention != expected.attention {
            let keys = |of: &Description| of.attention.as_object().map(|keys| keys.keys().cloned().collect::<Vec<_>>());
            if keys(&found) != keys(&expected) {
                return refuse("another kind of attention".to_owned());
            }
            let differs = |(key, value): (&String, &serde_json::Value)| {
                let ours = expected.attention.get(key)?;
                (value != ours).then(|| format!("`{key}` is {value}, the cache has {ours}"))
            };
            let first = found.attention.as_object().and_then(|keys| keys.iter().find_map(differs));
            return refuse(first.unwrap_or_else(|| "another configuration".to_owned()));
        }
        Ok((found.length, found.crc32))
    }
}

/// What both caches have.
macro_rules! shared {
    () => {
        fn batch(&self) -> &Batch {
            &self.batch
        }

        fn batch_mut(&mut self) -> &mut Batch {
            &mut self.batch
        }

        fn extents(&self) -> CacheOptions {
            self.options
        }

        fn device(&self) -> &Kernels {
            &self.kernels
        }

        fn attention(&self) -> &Self::Config {
            &self.config
        }
    };
}

impl Rows for LatentCache {
    type Config = AttentionConfig;
    shared!();

    fn fields(&self) -> Vec<Field<'_>> {
        let storage = self.options.storage;
        let of_storage = if storage == Storage::F32 { Dtype::F32 } else { Dtype::F16 };
        let part_rows = self.batch.part_rows;
        let mut fields = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let mut field = |name: &str, regions: Vec<_>, dtype, width: u32, row_words: u32| {
                if row_words > 0 && !regions.is_empty() {
                    let name = format!("layers.{index}.{name}");
                    fields.push(Field { name, regions, part_rows, dtype, width, row_words });
                }
            };
            let stored = |width: u32| (storage.sized(width.into()) / 4) as u32;
            let (d_latent, d_rope) = (self.widths.d_latent, self.widths.d_rope);
            let parts = || layer.parts.iter();
            field("latent", parts().map(|part| &part.latent).collect(), of_storage, d_latent, stored(d_latent));
            field("rope_key", parts().map(|part| &part.rope_key).collect(), of_storage, d_rope, stored(d_rope));
            field("statistics", parts().filter_map(|part| part.statistics.as_ref()).collect(), Dtype::F32, 2, 2);
        }
        fields
    }

    fn lists(&self) -> Option<&Lists> {
        self.lists.as_ref()
    }

    fn lists_mut(&mut self) -> Option<&mut Lists> {
        self.lists.as_mut()
    }

    fn outdate(&mut self) {
        self.settle();
    }

    fn vocab_size(&self) -> u32 {
        self.config.gate.as_ref().map_or(u32::MAX, |gate| gate.vocab_size)
    }

    fn empty(&self, options: CacheOptions) -> Result<Self> {
        LatentCache::with(&self.kernels, &self.config, (self.weights, self.gate_rows), options)
    }
}

impl Rows for KvCache {
    type Config = GqaConfig;
    shared!();

    fn fields(&self) -> Vec<Field<'_>> {
        let dtype = if self.options.storage == Storage::F32 { Dtype::F32 } else { Dtype::F16 };
        let mut fields = Vec::new();
        for (index, parts) in self.layers.iter().enumerate() {
            fields.push(Field {
                name: format!("layers.{index}.keys_and_values"),
                regions: parts.iter().collect(),
                part_rows: self.parts.part_rows,
                dtype,
                width: self.widths.kv(),
                row_words: (self.parts.row_bytes / 4) as u32,
            });
        }
        fields
    }

    fn outdate(&mut self) {
        self.batch.settle();
    }

    fn empty(&self, options: CacheOptions) -> Result<Self> {
        KvCache::with(&self.kernels, &self.config, &self.widths, options)
    }
}

/// The same documented methods for each cache.
macro_rules! moves {
    ($($cache:ident),*) => { $(
impl $cache {
    /// Records the copy of one sequence over another, in every layer; `to` then has the length of `from`.
    ///
    /// # Errors
    /// `ArgumentError::OutOfRange` when there is no such sequence; what recording refuses. The cache is then unchanged.
    pub fn copy_sequence(&mut self, recording: &mut Recording, from: usize, to: usize) -> Result<()> {
        Rows::copy(self, recording, from, to)
    }

    /// Records the copy of a sequence of another cache over one of this, in every layer; `to` then has the length of `from`.
    ///
    /// Both caches are of layers with one configuration and store their rows alike; capacity, batch, gate rows and all else
    /// may differ.
    ///
    /// # Errors
    /// `ArgumentError::OutOfRange` when there is no such sequence, [`Error::CacheFull`] where it does not fit,
    /// [`Error::Config`] for caches that differ; what recording refuses. This cache is then unchanged.
    pub fn copy_sequence_from(
        &mut self,
        recording: &mut Recording,
        to: usize,
        source: &Self,
        from: usize,
    ) -> Result<()> {
        Rows::copy_from(self, recording, to, source, from)
    }

    /// Makes room for `capacity` tokens of each sequence: allocates a larger cache, records the copy of every sequence into it,
    /// and takes its place. Until the recording has run, device memory holds both. Steps that were prepared before are stale.
    ///
    /// # Errors
    /// `ArgumentError::OutOfRange` for a smaller capacity; what `new` and recording refuse. The cache is then
    /// unchanged.
    pub fn grow(&mut self, recording: &mut Recording, capacity: u32) -> Result<()> {
        Rows::enlarge(self, recording, capacity)
    }

    /// Where the rows of a sequence stand, one region per layer and field, more where bindings of the cache end: what
    /// [`Self::save_sequence`] takes once they are read back, by [`crate::readback::read`] or by copies in an encoder of
    /// your own.
    ///
    /// # Errors
    /// `ArgumentError::OutOfRange` when there is no such sequence.
    pub fn sequence_regions(&self, sequence: usize) -> Result<Vec<Region>> {
        Rows::regions(self, sequence)
    }

    /// A sequence as the bytes of a safetensors file, from the content of [`Self::sequence_regions`]: rows as the cache
    /// holds them (widths padded with zeros, keys rotated, pairs side by side), token ids where the gate needs them, and a
    /// description with a version, the configuration and a checksum. [`Self::restore_sequence`] reads it.
    ///
    /// # Errors
    /// `ArgumentError::OutOfRange` when there is no such sequence, `ArgumentError::Count` for rows of another length.
    pub fn save_sequence(&self, sequence: usize, rows: &[Vec<u8>]) -> Result<Vec<u8>> {
        Rows::save(self, sequence, rows)
    }

    /// Records what makes a sequence one that was saved, by this process or another. The weights must be those that it was
    /// saved with: nothing can check that here.
    ///
    /// # Errors
    /// `DataError` for bytes that are cut, changed, of another version, configuration, storage or number of layers;
    /// [`Error::CacheFull`] where they do not fit; what allocating and recording refuse. The cache is then unchanged.
    pub fn restore_sequence(&mut self, recording: &mut Recording, sequence: usize, bytes: &[u8]) -> Result<()> {
        Rows::restore(self, recording, sequence, bytes)
    }
}
    )* };
}

moves!(LatentCache, KvCache);

/// Copies words from one run to another, of another buffer.
fn record_run(recording: &mut Recording, (from, to): (Run, Run), words: u32) -> Result<()> {
    let op = cache_move::CacheMove { words, from_word: from.word, to_word: to.word };
    recording.add_own(&op, cache_move::Args { source: &from.region, sink: &to.region })
}

/// The bytes of one tensor.
fn take_tensor<'a>(saved: &SafeTensors<'a>, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&'a [u8]> {
    let Ok(tensor) = saved.tensor(name) else { return refuse(format!("tensor `{name}` is missing")) };
    if tensor.dtype() != dtype || tensor.shape() != shape {
        let (found, of) = (tensor.dtype(), tensor.shape());
        return refuse(format!("tensor `{name}` is {found:?} {of:?}, expected {dtype:?} {shape:?}"));
    }
    Ok(tensor.data())
}

/// Gives a sequence these tokens in the lists, on the host and in a recording.
fn record_lists(lists: &mut Lists, recording: &mut Recording, sequence: u32, ids: &[u32]) -> Result<()> {
    let patches = lists.replace(sequence, ids);
    let table = recording.table((identity(), 2), cast_slice(&patches))?;
    let op = word_scatter::WordScatter { count: patches.len() as u32, words: lists.layout.words };
    recording.add_own(&op, word_scatter::Args { patches: &table, words: &Region::from(&lists.buffer) })
}
