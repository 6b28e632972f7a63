//! Generates text: continues a prompt token by token.

use crate::data::Tokenizer;
use crate::data::tokenizer::TextStream;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::ops::cached_attention::KeyValueCache;
use crate::study::exchange::Saved;
use crate::study::tasks::beginning;
use crate::tensor::random::{Purpose, Stream};
use std::io::Write;
use std::rc::Rc;
use std::time::Instant;

/// How the next token is sampled from the logits.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Divisor of the logits; 0 selects the token with the largest logit.
    pub temperature: f64,
    /// Number of most likely tokens to sample from; 0 for all.
    pub top_k: usize,
    /// Seed of the samples; an equal seed results in equal tokens.
    pub seed: u64,
    /// Number of continuations of the prompt.
    pub samples: usize,
}

impl Default for Sampling {
    /// The defaults of `routegrad generate`.
    fn default() -> Self {
        Sampling {
            temperature: 0.8,
            top_k: 0,
            seed: 0,
            samples: 1,
        }
    }
}

impl Sampling {
    fn validate(&self) -> Result<()> {
        if self.temperature >= 0.0 && self.temperature.is_finite() {
            return Ok(());
        }
        Err(Error::usage(
            "--temperature",
            "a finite number from 0 up",
            self.temperature.to_string(),
            "use 1 for the model's own distribution, and less for more likely text",
        ))
    }

    /// Samples token number `index` of continuation `sample` from the logits of all tokens.
    fn draw(&self, logits: &[f64], sample: usize, index: u64) -> usize {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        // Of tokens with equal logits, the one with the smaller number comes first.
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        if self.temperature == 0.0 {
            return order[0];
        }
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let highest = logits[order[0]];
        let weight = |t: &usize| ((logits[*t] - highest) / self.temperature).exp();
        let weights: Vec<f64> = order.iter().map(weight).collect();
        let stream = Stream::new(self.seed, Purpose::Generation, sample as u64, 0);
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

/// Statistics of the generated text.
#[derive(Clone, Copy, Debug)]
pub struct Generated {
    /// Number of generated tokens of all samples, without the prompt.
    pub tokens: usize,
    /// Time in seconds, without loading the model.
    pub seconds: f64,
}

/// Writes `prompt` and `count` generated tokens of a saved model to `out` as they are generated; fewer if the model ends
/// the text. It writes [`Sampling::samples`] continuations; if there are several, each follows a line `--- N ---`. The
/// model's context is the last `sequence_length` tokens.
///
/// # Errors
/// When the model cannot be read, the prompt does not fit the vocabulary, or a logit is not finite.
pub fn run(
    found: &Saved,
    prompt: &str,
    count: usize,
    sampling: &Sampling,
    out: &mut impl Write,
) -> Result<Generated> {
    sampling.validate()?;
    let (model, state) = found.load(|_| ())?;
    let tokenizer = found.tokenizer(&state.config.data)?;
    let vocabulary = model.config().vocab_size;
    let tokens = start(&tokenizer, prompt)?;
    if let Some(token) = tokens.iter().find(|t| **t as usize >= vocabulary) {
        return Err(Error::usage(
            "--prompt",
            format!("tokens below the model's vocabulary of {vocabulary}"),
            format!("token {token}"),
            "use plain letters",
        ));
    }
    let speaker = Speaker {
        model,
        tokenizer,
        prompt,
        tokens,
    };
    let (begun, mut made) = (Instant::now(), 0);
    for sample in 0..sampling.samples {
        if sampling.samples > 1 {
            write(out, &format!("--- {} ---\n", sample + 1))?;
        }
        made += speaker.speak(sample, count, sampling, out)?;
    }
    Ok(Generated {
        tokens: made,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

fn write(out: &mut impl Write, text: &str) -> Result<()> {
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|e| Error::io("write", "the standard output", e))
}

/// A model that continues a prompt.
struct Speaker<'a> {
    model: Model,
    tokenizer: Tokenizer,
    prompt: &'a str,
    /// Tokens of the prompt.
    tokens: Vec<i32>,
}

impl Speaker<'_> {
    /// Writes the prompt and its continuation number `sample`; returns the number of generated tokens.
    fn speak(
        &self,
        sample: usize,
        count: usize,
        sampling: &Sampling,
        out: &mut impl Write,
    ) -> Result<usize> {
        let mut text = TextStream::new(&self.tokenizer);
        // The prompt is written exactly as it was given.
        write(out, self.prompt)?;
        text.push(&self.tokens)?;
        let (mut tokens, cache) = (self.tokens.clone(), Rc::default());
        for index in 0..count {
            let logits = self.next_logits(&cache, &tokens)?;
            if !logits.iter().all(|z| z.is_finite()) {
                return Err(Error::NonFinite {
                    what: format!("a logit of token {index}"),
                    help: "the model diverged: use an earlier checkpoint".into(),
                });
            }
            // A model may have more tokens than its tokenizer; training never used these.
            let known = logits.len().min(self.tokenizer.vocab_size());
            let token = sampling.draw(&logits[..known], sample, index as u64) as i32;
            if Some(token) == self.tokenizer.eos() {
                break;
            }
            tokens.push(token);
            write(out, &text.push(&[token])?)?;
        }
        write(out, &(text.finish()? + "\n"))?;
        Ok(tokens.len() - self.tokens.len())
    }

    /// Returns the logits of the token after `tokens`, which must begin with the tokens of the previous call. On the CPU,
    /// keys and values are cached as long as the model's context covers the complete text; once its beginning is cut off,
    /// the position of every row changes.
    fn next_logits(&self, cache: &Rc<KeyValueCache>, tokens: &[i32]) -> Result<Vec<f64>> {
        let longest = self.model.config().sequence_length;
        if tokens.len() > longest || self.model.device() != Device::Cpu {
            let from = tokens.len().saturating_sub(longest);
            return self.model.next_token_logits(&tokens[from..], 1);
        }
        let further = &tokens[cache.rows()..];
        self.model.next_token_logits_after(cache, further)
    }
}

/// Returns the tokens of a prompt, after the token that begins a text. An empty prompt becomes the end of a document, so
/// that the model begins a new one.
fn start(tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<i32>> {
    let tokens = tokenizer.encode(prompt)?;
    match tokens.is_empty() {
        true => beginning(tokenizer),
        false => Ok(tokenizer.bos().into_iter().chain(tokens).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn sampling(temperature: f64, top_k: usize) -> Sampling {
        Sampling {
            temperature,
            top_k,
            seed: 7,
            samples: 1,
        }
    }

    #[test]
    fn temperature_zero_selects_the_most_likely_token() {
        assert_eq!(sampling(0.0, 0).draw(&[0.0, 2.0, 2.0, 1.0], 0, 5), 1);
    }

    #[test]
    fn draws_follow_the_softmax_of_the_logits() {
        let logits = [1f64.ln(), 2f64.ln(), 5f64.ln()];
        let n = 40_000;
        let mut counts = [0; 3];
        (0..n).for_each(|i| counts[sampling(1.0, 0).draw(&logits, 0, i)] += 1);
        for (count, p) in counts.iter().zip([0.125, 0.25, 0.625]) {
            let share = f64::from(*count) / n as f64;
            assert!((share - p).abs() < 0.013, "{share} is not {p}");
        }
        // At half the temperature the odds are squared: 1 : 4 : 25.
        let mut last = 0;
        (0..n).for_each(|i| last += u64::from(sampling(0.5, 0).draw(&logits, 0, i) == 2));
        assert!((last as f64 / n as f64 - 25.0 / 30.0).abs() < 0.01);
    }

    #[test]
    fn top_k_leaves_out_the_rest() {
        let logits = [0.0, 0.1, 0.2, 0.3];
        let drawn = (0..200).map(|i| sampling(1.0, 2).draw(&logits, 0, i));
        assert_eq!(drawn.collect::<BTreeSet<_>>(), BTreeSet::from([2, 3]));
    }

    #[test]
    fn an_impossible_temperature_is_refused() {
        for t in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(sampling(t, 0).validate().is_err());
        }
    }
}
