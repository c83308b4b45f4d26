//! Writes single words of a buffer.

/// `words[word] = value` for every `(word, value)`.
pub fn word_scatter(words: &mut [u32], patches: &[[u32; 2]]) {
    for &[word, value] in patches {
        words[word as usize] = value;
    }
}
