//! Rows of a sequence on the move: to another sequence, to another cache, to bytes and back.

use std::collections::HashMap;

use bytemuck::cast_slice;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use super::cache::{CacheOptions, LatentCache};
use super::lists::Lists;
use super::step::identity;
use crate::device::Region;
use crate::error::{ArgumentError, DataError, Error, Result};
use crate::files::tensors;
use crate::kernels::{cache_copy, cache_move, word_scatter};
use crate::recording::Recording;
use crate::storage::{Storage, words};

/// The format of [`LatentCache::save_sequence`].
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
    /// Of every tensor's bytes, in the order of [`LatentCache::parts`], then of the token ids.
    crc32: u32,
}

/// A part of one layer's cache: rows of words, sequence after sequence.
struct Part<'a> {
    name: String,
    region: &'a Region,
    dtype: Dtype,
    /// Elements of a row, with its padding.
    width: u32,
    row_words: u32,
}

impl Part<'_> {
    /// The rows of a sequence.
    fn rows(&self, first_row: u32, rows: u32) -> Region {
        Region::new(&self.region.buffer, self.region.offset + self.bytes(first_row), self.bytes(rows))
    }

    fn bytes(&self, rows: u32) -> u64 {
        words(u64::from(rows) * u64::from(self.row_words))
    }
}

fn refuse<T>(problem: String) -> Result<T> {
    Err(DataError::Input(format!("saved sequence: {problem}")).into())
}

impl LatentCache {
    /// Every part of every layer that has rows.
    fn parts(&self) -> Vec<Part<'_>> {
        let storage = self.options.storage;
        let of_storage = if storage == Storage::F32 { Dtype::F32 } else { Dtype::F16 };
        let mut parts = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let mut part = |name: &str, region, dtype, width: u32, row_words: u32| {
                if row_words > 0 {
                    parts.push(Part { name: format!("layers.{index}.{name}"), region, dtype, width, row_words });
                }
            };
            let stored = |width: u32| (storage.sized(width.into()) / 4) as u32;
            let (d_latent, d_rope) = (self.widths.d_latent, self.widths.d_rope);
            part("latent", &layer.latent, of_storage, d_latent, stored(d_latent));
            part("rope_key", &layer.rope_key, of_storage, d_rope, stored(d_rope));
            if let Some(statistics) = &layer.statistics {
                part("statistics", statistics, Dtype::F32, 2, 2);
            }
        }
        parts
    }

    /// Records the copy of one sequence over another, in every layer; `to` then has the length of `from`.
    ///
    /// # Errors
    /// `ArgumentError::OutOfRange` when there is no such sequence; what recording refuses. The cache is then unchanged.
    pub fn copy_sequence(&mut self, recording: &mut Recording, from: usize, to: usize) -> Result<()> {
        recording.kernels().same_device(&self.kernels, "the cache", "recording")?;
        self.batch.check_sequence(from)?;
        self.batch.check_sequence(to)?;
        if from == to {
            return Ok(());
        }
        self.settle();
        let mark = recording.mark();
        self.record_copy(recording, from as u32, to as u32).inspect_err(|_| recording.rewind(mark))?;
        if let Some(lists) = &mut self.lists {
            lists.copy(from as u32, to as u32);
        }
        self.batch.lengths[to] = self.batch.lengths[from];
        Ok(())
    }

    fn record_copy(&self, recording: &mut Recording, from: u32, to: u32) -> Result<()> {
        let length = self.batch.lengths[from as usize];
        let mut copy = |region: &Region, words: u32, from_word: u32, to_word: u32| {
            let op = cache_copy::CacheCopy { words, from_word, to_word };
            recording.add_own(&op, cache_copy::Args { cache: region })
        };
        for part in self.parts() {
            // Every cache buffer is within a binding, so word indices fit 32 bits.
            let first = |sequence: u32| sequence * self.options.capacity * part.row_words;
            copy(part.region, length * part.row_words, first(from), first(to))?;
        }
        let Some(lists) = &self.lists else { return Ok(()) };
        for (from_word, to_word, words) in lists.copies(from, to, length) {
            copy(&Region::from(&lists.buffer), words, from_word, to_word)?;
        }
        Ok(())
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
        source: &LatentCache,
        from: usize,
    ) -> Result<()> {
        recording.kernels().same_device(&source.kernels, "the cache to copy from", "recording")?;
        source.batch.check_sequence(from)?;
        let alike = |cache: &LatentCache| (cache.options.storage, cache.options.n_layer);
        if source.config != self.config || alike(source) != alike(self) {
            let problem = "the cache to copy from is of another configuration, storage or number of layers";
            return Err(Error::config("(attention)", problem));
        }
        let length = source.batch.lengths[from];
        let ids = source.lists.as_ref().map_or(&[][..], |lists| lists.ids_of(from, length));
        let first_row = from as u32 * source.options.capacity;
        let parts = source.parts();
        let sources: Vec<_> = parts.iter().map(|part| (part.region.clone(), first_row * part.row_words)).collect();
        self.receive(recording, to, length, ids, &sources)
    }

    /// Refuses a sequence that is not there, or has no room for `length` tokens in all.
    fn check_room(&self, sequence: usize, length: u32) -> Result<()> {
        self.batch.check_sequence(sequence)?;
        let capacity = self.options.capacity;
        match length <= capacity {
            true => Ok(()),
            false => Err(Error::CacheFull { sequence, length: 0, added: length.into(), capacity }),
        }
    }

    /// Makes a sequence `length` rows of other buffers: each with its first word, in the order of [`LatentCache::parts`].
    fn receive(
        &mut self,
        recording: &mut Recording,
        to: usize,
        length: u32,
        ids: &[u32],
        sources: &[(Region, u32)],
    ) -> Result<()> {
        recording.kernels().same_device(&self.kernels, "the cache", "recording")?;
        self.check_room(to, length)?;
        self.settle();
        let (mark, before) = (recording.mark(), self.lists.clone());
        let recorded = self.record_rows(recording, to, length, sources).and_then(|()| match &mut self.lists {
            Some(lists) => record_lists(lists, recording, to as u32, ids),
            None => Ok(()),
        });
        match recorded {
            Ok(()) => self.batch.lengths[to] = length,
            Err(_) => {
                recording.rewind(mark);
                self.lists = before;
            }
        }
        recorded
    }

    fn record_rows(&self, recording: &mut Recording, to: usize, length: u32, sources: &[(Region, u32)]) -> Result<()> {
        for (part, (source, from_word)) in self.parts().iter().zip(sources) {
            let to_word = to as u32 * self.options.capacity * part.row_words;
            let op = cache_move::CacheMove { words: length * part.row_words, from_word: *from_word, to_word };
            recording.add_own(&op, cache_move::Args { source, sink: part.region })?;
        }
        Ok(())
    }

    /// Makes room for `capacity` tokens of each sequence: allocates a larger cache, records the copy of every sequence into it,
    /// and takes its place. Until the recording has run, device memory holds both. Steps that were prepared before are stale.
    ///
    /// # Errors
    /// `ArgumentError::OutOfRange` for a smaller capacity; what [`LatentCache::new`] and recording refuse. The cache is then
    /// unchanged.
    pub fn grow(&mut self, recording: &mut Recording, capacity: u32) -> Result<()> {
        let options = self.options;
        if capacity < options.capacity {
            let (what, found, limit) = ("capacity that a cache is grown from", options.capacity, capacity);
            return Err(ArgumentError::OutOfRange { what, found: found.into(), limit: limit.into() }.into());
        }
        let options = CacheOptions { capacity, ..options };
        let mut larger = LatentCache::with(&self.kernels, &self.config, (self.weights, self.gate_rows), options)?;
        let mark = recording.mark();
        for sequence in 0..self.batch.lengths.len() {
            let copied = larger.copy_sequence_from(recording, sequence, self, sequence);
            copied.inspect_err(|_| recording.rewind(mark))?;
        }
        *self = larger;
        Ok(())
    }

    /// Where the rows of a sequence stand: what [`LatentCache::save_sequence`] takes once they are read back, by
    /// [`crate::readback::read`] or by copies in an encoder of your own.
    ///
    /// # Errors
    /// `ArgumentError::OutOfRange` when there is no such sequence.
    pub fn sequence_regions(&self, sequence: usize) -> Result<Vec<Region>> {
        self.batch.check_sequence(sequence)?;
        let (first_row, length) = (sequence as u32 * self.options.capacity, self.batch.lengths[sequence]);
        Ok(self.parts().iter().map(|part| part.rows(first_row, length)).collect())
    }

    /// A sequence as the bytes of a safetensors file, from the content of [`LatentCache::sequence_regions`]: rows as the cache
    /// holds them (widths padded with zeros, keys rotated, pairs side by side), token ids where the gate needs them, and a
    /// description with a version, the configuration and a checksum. [`LatentCache::restore_sequence`] reads it.
    ///
    /// # Errors
    /// `ArgumentError::OutOfRange` when there is no such sequence, `ArgumentError::Count` for rows of another length.
    pub fn save_sequence(&self, sequence: usize, rows: &[Vec<u8>]) -> Result<Vec<u8>> {
        self.batch.check_sequence(sequence)?;
        let (parts, length) = (self.parts(), self.batch.lengths[sequence]);
        let count = |what, expected, found| Err(ArgumentError::Count { what, expected, found }.into());
        if rows.len() != parts.len() {
            return count("regions of a saved sequence", parts.len() as u64, rows.len() as u64);
        }
        let mut crc32 = crc32fast::Hasher::new();
        let mut views = Vec::new();
        for (part, rows) in parts.iter().zip(rows) {
            if part.bytes(length) != rows.len() as u64 {
                return count("bytes of a region of a saved sequence", part.bytes(length), rows.len() as u64);
            }
            crc32.update(rows);
            views.push((part.name.clone(), part.dtype, vec![length as usize, part.width as usize], &rows[..]));
        }
        if let Some(lists) = &self.lists {
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
        let CacheOptions { storage, n_layer, .. } = self.options;
        let attention = serde_json::to_value(&self.config)?;
        Ok(Description { version: VERSION, attention, storage, n_layer, length, crc32: 0 })
    }

    /// Records what makes a sequence one that was saved, by this process or another. The weights must be those that it was
    /// saved with: nothing can check that here.
    ///
    /// # Errors
    /// `DataError` for bytes that are cut, changed, of another version, configuration, storage or number of layers;
    /// [`Error::CacheFull`] where they do not fit; what allocating and recording refuse. The cache is then unchanged.
    pub fn restore_sequence(&mut self, recording: &mut Recording, sequence: usize, bytes: &[u8]) -> Result<()> {
        let saved = tensors(bytes)?;
        let (length, crc32) = self.check_description(bytes)?;
        let parts = self.parts();
        let mut hasher = crc32fast::Hasher::new();
        let mut take = |name: &str, dtype: Dtype, shape: &[usize]| {
            let data = take_tensor(&saved, name, dtype, shape)?;
            hasher.update(data);
            Ok::<_, Error>(data)
        };
        let rows = parts
            .iter()
            .map(|part| take(&part.name, part.dtype, &[length as usize, part.width as usize]))
            .collect::<Result<Vec<_>>>()?;
        let ids: Vec<u32> = match &self.lists {
            Some(_) => bytemuck::pod_collect_to_vec(take("token_ids", Dtype::U32, &[length as usize])?),
            None => Vec::new(),
        };
        let expected = rows.len() + usize::from(self.lists.is_some());
        if saved.len() != expected {
            return refuse(format!("{} tensors, expected {expected}", saved.len()));
        }
        if hasher.finalize() != crc32 {
            return refuse("its bytes have changed since it was saved (the checksum differs)".to_owned());
        }
        let vocab_size = self.config.gate.as_ref().map_or(u32::MAX, |gate| gate.vocab_size);
        if let Some(index) = ids.iter().position(|&id| id >= vocab_size) {
            return Err(ArgumentError::TokenId { index, id: ids[index].into(), vocab_size }.into());
        }
        // Refused before anything is allocated.
        self.check_room(sequence, length)?;
        let sources = rows.iter().zip(&parts).filter(|(rows, _)| !rows.is_empty()).map(|(rows, part)| {
            let buffer = self.kernels.upload(&format!("egmla.restored.{}", part.name), rows)?;
            Ok((Region::from(&buffer), 0))
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
