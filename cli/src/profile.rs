//! `generate --profile`: where the time of a token goes.

use std::time::Instant;

use egmla::bench::timer::{Clock, Parts, Timer};
use egmla::{Kernels, Recording};

use crate::failure::Failure;

/// Microseconds of one decode step.
#[derive(Debug, Clone, Copy, Default)]
struct Token {
    /// Prepare, record, submit.
    host: f64,
    /// The pass by the device's clock; 0 without one.
    device: f64,
    /// From submission to the end of the work, as the host sees it.
    wait: f64,
    /// Logits to the host.
    readback: f64,
}

/// The times of every decode step since the last [`Profile::clear`].
pub struct Profile {
    timer: Timer,
    tokens: Vec<Token>,
}

/// Microseconds since a point in time.
fn since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e6
}

impl Profile {
    /// With the device's timestamps where it has them.
    pub fn new(kernels: &Kernels) -> Result<Self, Failure> {
        Ok(Profile { timer: Timer::new(kernels)?, tokens: Vec::new() })
    }

    /// Forgets what was measured.
    pub fn clear(&mut self) {
        self.tokens.clear();
    }

    /// Runs the recording of a step that the host began to prepare at `begun`, and waits for its end.
    pub fn run(&mut self, recording: &mut Recording, begun: Instant) -> Result<(), Failure> {
        let prepared = since(begun);
        let Parts { submit_us, wait_us, device_us } = self.timer.parts(recording)?;
        let (host, device) = (prepared + submit_us, device_us.unwrap_or_default());
        self.tokens.push(Token { host, device, wait: wait_us, readback: 0.0 });
        Ok(())
    }

    /// The logits of the last step have come, asked for at `asked`.
    pub fn read(&mut self, asked: Instant) {
        if let Some(token) = self.tokens.last_mut() {
            token.readback = since(asked);
        }
    }

    /// Lines for the user: medians and sums, and what takes most of a token.
    pub fn lines(&self) -> Vec<String> {
        lines(&self.tokens, self.timer.clock() == Clock::Timestamps)
    }
}

/// The middle, the upper one of an even count.
fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn lines(tokens: &[Token], timestamps: bool) -> Vec<String> {
    if tokens.is_empty() {
        return vec!["profile: no decode step".to_owned()];
    }
    let of = |part: fn(&Token) -> f64| {
        let times: Vec<f64> = tokens.iter().map(part).collect();
        (times.iter().sum::<f64>(), median(times))
    };
    let line = |name: &str, (sum, median): (f64, f64)| {
        format!("  {name}: {median:.0} µs a token in the median, {:.1} ms in all", sum / 1e3)
    };
    let (host, device, wait) = (of(|token| token.host), of(|token| token.device), of(|token| token.wait));
    let readback = of(|token| token.readback);
    let mut all = vec![
        format!("profile of {} decode steps, each waited for before its logits are read:", tokens.len()),
        line("host (prepare, record, submit)", host),
    ];
    if timestamps {
        all.push(line("device (timestamps, within the wait)", device));
    } else {
        all.push("  device: not measured, the adapter has no timestamps".to_owned());
    }
    all.push(line("wait (submission to its end)", wait));
    all.push(line("readback (logits)", readback));
    let waiting =
        if timestamps { "submission and waiting, beyond the device's work" } else { "waiting for the device" };
    let parts = [
        (host.0, "the host"),
        (device.0, "the device"),
        ((wait.0 - device.0).max(0.0), waiting),
        (readback.0, "readback"),
    ];
    let total = host.0 + wait.0.max(device.0) + readback.0;
    if let Some((most, name)) = parts.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)) {
        all.push(format!("bottleneck: {name}, {:.0} % of the time", 100.0 * most / total.max(1e-9)));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::{Token, lines};

    #[test]
    fn the_largest_part_is_the_bottleneck() {
        let token = |host, device, wait, readback| Token { host, device, wait, readback };
        let last = |tokens: &[Token], timestamps| lines(tokens, timestamps).pop().unwrap_or_default();
        let mixed = [token(10.0, 50.0, 60.0, 30.0), token(10.0, 70.0, 80.0, 30.0), token(10.0, 60.0, 60.0, 30.0)];
        assert_eq!(last(&mixed, true), "bottleneck: the device, 56 % of the time");
        let all = lines(&mixed, true);
        assert_eq!(all[2], "  device (timestamps, within the wait): 60 µs a token in the median, 0.2 ms in all");
        assert_eq!(last(&[token(80.0, 10.0, 15.0, 5.0)], true), "bottleneck: the host, 80 % of the time");
        let idle = "bottleneck: submission and waiting, beyond the device's work, 70 % of the time";
        assert_eq!(last(&[token(10.0, 10.0, 80.0, 10.0)], true), idle);
        assert_eq!(
            last(&[token(10.0, 0.0, 80.0, 10.0)], false),
            "bottleneck: waiting for the device, 80 % of the time"
        );
        assert!(lines(&mixed, false)[2].contains("no timestamps"));
        assert_eq!(lines(&[], true), ["profile: no decode step"]);
    }
}
