//! `generate --stop`: texts that end the text and are not shown.

/// Text that comes in parts, up to the first stop in it.
pub struct Stops<'a> {
    stops: &'a [String],
    /// The end of the text so far, which may be the start of a stop.
    held: String,
}

impl<'a> Stops<'a> {
    /// None of `stops` is empty.
    pub fn new(stops: &'a [String]) -> Self {
        Stops { stops, held: String::new() }
    }

    /// Adds a part. Returns what can be shown, and whether a stop follows it.
    pub fn push(&mut self, part: &str) -> (String, bool) {
        self.held.push_str(part);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let begins_stop = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let kept = self.held.char_indices().map(|(at, _)| at).find(begins_stop).unwrap_or(self.held.len());
        let rest = self.held.split_off(kept);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back: no stop came of it.
    pub fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::Stops;

    /// The text that is shown of parts, and whether it was stopped.
    fn shown(stops: &[&str], parts: &[&str]) -> (String, bool) {
        let stops: Vec<_> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut of = Stops::new(&stops);
        let mut text = String::new();
        for part in parts {
            let (new, stopped) = of.push(part);
            text += &new;
            if stopped {
                return (text, true);
            }
        }
        (text + &of.finish(), false)
    }

    #[test]
    fn a_stop_ends_the_text_and_is_not_shown() {
        let text = |stops, parts| shown(stops, parts);
        assert_eq!(text(&[], &["a", "b"]), ("ab".to_owned(), false));
        assert_eq!(text(&["END"], &["a E", "N", "D b"]), ("a ".to_owned(), true));
        assert_eq!(text(&["END"], &["a E", "N", "d b"]), ("a ENd b".to_owned(), false));
        assert_eq!(text(&["END"], &["EN"]), ("EN".to_owned(), false));
        // The first in the text, not in the list; one that begins within another.
        assert_eq!(text(&["bc", "ab"], &["xabc"]), ("x".to_owned(), true));
        assert_eq!(text(&["aab"], &["aa", "ab"]), ("a".to_owned(), true));
        assert_eq!(text(&["\n\n"], &["é\n", "✓\n", "\n"]), ("é\n✓".to_owned(), true));
    }

    #[test]
    fn only_what_may_be_a_stop_is_held_back() {
        let stops = ["END".to_owned()];
        let mut of = Stops::new(&stops);
        assert_eq!(of.push("an E"), ("an ".to_owned(), false));
        assert_eq!(of.push("lk"), ("Elk".to_owned(), false));
    }
}
