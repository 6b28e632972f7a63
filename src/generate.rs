//! A prompt continued, token by token.

use crate::checkpoint::{self, Checkpoint};
use crate::error::{Error, Result};
use crate::random::{Purpose, Stream};
use std::io::Write;

/// How the next token is drawn from the logits.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Draws among this many likeliest tokens; 0 for all.
    pub top_k: usize,
    pub seed: u64,
}

impl Sampling {
    fn validate(&self) -> Result<()> {
        if self.temperature >= 0.0 && self.temperature.is_finite() {
            return Ok(());
        }
        Err(Error::invalid(
            "--temperature",
            "a finite number from 0 up",
            self.temperature.to_string(),
            "take 1 for the model's own distribution, less for safer text",
        ))
    }

    /// Token number `index` of a continuation, from the logits of every token.
    fn draw(&self, logits: &[f64], index: u64) -> usize {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        // Ties go to the lower token.
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        if self.temperature == 0.0 {
            return order[0];
        }
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let highest = logits[order[0]];
        let weights: Vec<f64> = order
            .iter()
            .map(|t| ((logits[*t] - highest) / self.temperature).exp())
            .collect();
        let stream = Stream::new(self.seed, Purpose::Generation, 0, 0);
        let mut left = f64::from(stream.uniform(index)) * weights.iter().sum::<f64>();
        for (token, weight) in order.iter().zip(&weights) {
            left -= weight;
            if left < 0.0 {
                return *token;
            }
        }
        order[0]
    }
}

/// Writes `prompt` and `tokens` further tokens of a checkpoint's model to `out` as
/// they come. The model sees the last `sequence_length` tokens.
///
/// # Errors
/// When the checkpoint cannot be read, the prompt does not fit the vocabulary, or a logit is not
/// finite.
pub fn run(
    found: &Checkpoint,
    prompt: &str,
    tokens: usize,
    sampling: &Sampling,
    out: &mut impl Write,
) -> Result<()> {
    sampling.validate()?;
    let (model, _) = checkpoint::load_model(found)?;
    let config = model.config();
    // Without a prompt the model begins as after the end of a document.
    let prompt = if prompt.is_empty() {
        crate::data::DOCUMENT_END
    } else {
        prompt
    };
    let mut text: Vec<i32> = prompt.bytes().map(i32::from).collect();
    if let Some(byte) = text.iter().find(|b| **b as usize >= config.vocab_size) {
        return Err(Error::invalid(
            "--prompt",
            format!(
                "bytes below the model's vocabulary of {}",
                config.vocab_size
            ),
            format!("byte {byte}"),
            "use plain letters",
        ));
    }
    let mut writer = Utf8Writer {
        out,
        held: Vec::new(),
    };
    writer.write(prompt.as_bytes())?;
    for index in 0..tokens {
        let from = text.len().saturating_sub(config.sequence_length);
        let logits = model.next_token_logits(&text[from..], 1)?;
        if !logits.iter().all(|z| z.is_finite()) {
            return Err(Error::NonFinite {
                what: format!("a logit of token {index}"),
                help: "the model diverged: use an earlier checkpoint".into(),
            });
        }
        // A vocabulary of more than the 256 bytes has tokens that training never saw.
        let token = sampling.draw(&logits[..logits.len().min(256)], index as u64);
        text.push(token as i32);
        writer.write(&[token as u8])?;
    }
    writer.finish()
}

/// Writes bytes as text: holds back the beginning of a character until its end has come, and puts
/// U+FFFD for what can become none.
struct Utf8Writer<'a, W: Write> {
    out: &'a mut W,
    held: Vec<u8>,
}

impl<W: Write> Utf8Writer<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        let mut kept = 0;
        for chunk in self.held.utf8_chunks() {
            text.push_str(chunk.valid());
            kept += chunk.valid().len();
            let invalid = chunk.invalid();
            let at_end = kept + invalid.len() == self.held.len();
            // At the end, a cut-off character may still be completed.
            if invalid.is_empty() || at_end && is_beginning(invalid) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            kept += invalid.len();
        }
        self.held.drain(..kept);
        self.put(&text)
    }

    fn finish(mut self) -> Result<()> {
        let rest = String::from_utf8_lossy(&self.held).into_owned();
        self.put(&(rest + "\n"))
    }

    fn put(&mut self, text: &str) -> Result<()> {
        self.out
            .write_all(text.as_bytes())
            .and_then(|()| self.out.flush())
            .map_err(|e| Error::io("write", "the standard output", e))
    }
}

/// Whether more bytes could make `bytes` a character.
fn is_beginning(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|e| e.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_k: usize) -> Sampling {
        Sampling {
            temperature,
            top_k,
            seed: 7,
        }
    }

    #[test]
    fn temperature_zero_takes_the_likeliest_token() {
        assert_eq!(sampling(0.0, 0).draw(&[0.0, 2.0, 2.0, 1.0], 5), 1);
    }

    #[test]
    fn draws_follow_the_softmax_of_the_logits() {
        let logits = [1f64.ln(), 2f64.ln(), 5f64.ln()];
        let n = 40_000;
        let mut counts = [0; 3];
        (0..n).for_each(|i| counts[sampling(1.0, 0).draw(&logits, i)] += 1);
        for (count, p) in counts.iter().zip([0.125, 0.25, 0.625]) {
            let share = f64::from(*count) / n as f64;
            assert!((share - p).abs() < 0.013, "{share} is not {p}");
        }
        // At half the temperature the odds are squared: 1 : 4 : 25.
        let mut last = 0;
        (0..n).for_each(|i| last += u64::from(sampling(0.5, 0).draw(&logits, i) == 2));
        assert!((last as f64 / n as f64 - 25.0 / 30.0).abs() < 0.01);
    }

    #[test]
    fn top_k_leaves_out_the_rest() {
        let logits = [0.0, 0.1, 0.2, 0.3];
        let drawn: std::collections::BTreeSet<usize> = (0..200)
            .map(|i| sampling(1.0, 2).draw(&logits, i))
            .collect();
        assert_eq!(drawn.into_iter().collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn characters_appear_whole_and_broken_ones_are_marked() {
        let mut out = Vec::new();
        let mut writer = Utf8Writer {
            out: &mut out,
            held: Vec::new(),
        };
        for byte in "a é€".bytes().chain([0xff, b'b', 0xe2, b'c', 0xe2, 0x82]) {
            writer.write(&[byte]).unwrap();
        }
        writer.finish().unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "a é€\u{fffd}b\u{fffd}c\u{fffd}\n"
        );
    }

    #[test]
    fn an_impossible_temperature_is_refused() {
        for t in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(sampling(t, 0).validate().is_err());
        }
    }
}
