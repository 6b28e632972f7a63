//! Converts questions to tokens: the input of the model, and which of its tokens are scored.

use super::question::Question;
use crate::data::{DOCUMENT_END, Tokenizer};
use crate::error::Result;
use crate::ops::spans::Spans;

/// Minimum number of shared tokens for which the shared beginning gets a span of its own.
const SHARED: usize = 8;

/// One answer as input of the model.
#[derive(Debug, PartialEq)]
pub struct Request {
    /// Tokens of prompt and answer without the last token, whose successor is not scored. If they exceed the model's
    /// context, only the last ones are kept.
    pub tokens: Vec<i32>,
    /// Tokens of the answer. The model reads all but the last of them.
    pub scored: Vec<i32>,
    /// Whether the beginning of the prompt, or of the answer, was cut off.
    pub truncated: bool,
}

/// Converts a prompt and an answer to tokens as the harness does: spaces at the end of the prompt are moved to the answer;
/// both are encoded together; the answer starts after as many tokens as the prompt has alone; if the text is too long, its
/// end is kept.
pub fn request(
    prompt: &str,
    answer: &str,
    longest: usize,
    tokenizer: &Tokenizer,
) -> Result<Request> {
    let (prompt_alone, text) = (trimmed(prompt), format!("{prompt}{answer}"));
    let mut whole = tokenizer.encode_processed(&text)?;
    let mut context = match prompt_alone {
        "" => 0,
        prompt => tokenizer.encode_processed(prompt)?.len(),
    };
    if context == 0 || whole.len() < 2 {
        // There is no token before the answer.
        let before = beginning(tokenizer)?;
        context = before.len();
        whole = [before, tokenizer.encode(&text)?].concat();
    }
    let read = whole.len().saturating_sub(1);
    let from = whole.len().saturating_sub(longest + 1);
    let scored = context.min(read).max(from + 1).min(whole.len());
    Ok(Request {
        tokens: whole[from..read].to_vec(),
        scored: whole[scored..].to_vec(),
        truncated: from > 0,
    })
}

/// Returns a prompt without white space at its end, as Python defines white space.
fn trimmed(prompt: &str) -> &str {
    prompt.trim_end_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c))
}

/// Returns the context of a text without a prompt: the token that begins a text, or the one that ends it, or the end of
/// a document.
pub fn beginning(tokenizer: &Tokenizer) -> Result<Vec<i32>> {
    match tokenizer.bos().or(tokenizer.eos()) {
        Some(token) => Ok(vec![token]),
        None => tokenizer.encode(DOCUMENT_END),
    }
}

/// The requests of several questions in one forward pass.
#[derive(Default)]
pub struct Batch {
    pub tokens: Vec<i32>,
    pub spans: Spans,
    /// Pairs of a row and the token that follows it.
    pub targets: Vec<(usize, i32)>,
    /// Number of tokens that the requests would have without sharing.
    pub whole: usize,
}

impl Batch {
    /// Adds the answers of one question; the longest beginning that they share is read only once. For each answer, in
    /// order, one target is added per scored token.
    pub fn add(&mut self, requests: &[Request]) -> Result<()> {
        let first = &requests[0].tokens;
        let mut shared = if requests.len() > 1 { first.len() } else { 0 };
        for request in requests {
            let pairs = first.iter().zip(&request.tokens);
            shared = shared.min(pairs.take_while(|(a, b)| a == b).count());
        }
        let base = self.tokens.len();
        let prefix = if shared < SHARED {
            shared = 0;
            None
        } else {
            self.tokens.extend(&first[..shared]);
            Some(self.spans.add(shared))
        };
        for request in requests {
            let own = &request.tokens[shared..];
            let begin = self.tokens.len();
            match prefix {
                _ if own.is_empty() => {}
                Some(prefix) => {
                    self.spans.add_behind(prefix, own.len())?;
                }
                None => {
                    self.spans.add(own.len());
                }
            }
            self.tokens.extend(own);
            self.whole += request.tokens.len();
            let from = request.tokens.len() - request.scored.len();
            for (i, &token) in request.scored.iter().enumerate() {
                let row = match (from + i).checked_sub(shared) {
                    Some(own) => begin + own,
                    None => base + from + i,
                };
                self.targets.push((row, token));
            }
        }
        Ok(())
    }
}

/// Returns the requests of a question's answers.
pub fn requests(
    question: &Question,
    longest: usize,
    tokenizer: &Tokenizer,
) -> Result<Vec<Request>> {
    let each = |(prompt, answer): &(String, String)| request(prompt, answer, longest, tokenizer);
    question.answers.iter().map(each).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ints(text: &str) -> Vec<i32> {
        text.bytes().map(i32::from).collect()
    }

    #[test]
    fn a_request_keeps_its_end_and_scores_the_answer() {
        let r = request("abc", " de", 10, &Tokenizer::bytes()).unwrap();
        assert_eq!((r.tokens, r.scored), (ints("abc d"), ints(" de")));
        assert!(!r.truncated);
        // The model reads four tokens; five are kept.
        let r = request("abc", " de", 4, &Tokenizer::bytes()).unwrap();
        assert_eq!(
            (r.tokens, r.scored, r.truncated),
            (ints("bc d"), ints(" de"), true)
        );
        // If an answer is longer than the model's context, its end is scored.
        let r = request("abc", " defg", 3, &Tokenizer::bytes()).unwrap();
        assert_eq!((r.tokens, r.scored), (ints("def"), ints("efg")));
        // An answer without a prompt follows the end of a document.
        let r = request("", "ab", 9, &Tokenizer::bytes()).unwrap();
        assert_eq!((r.tokens, r.scored), (ints("\n\n\na"), ints("ab")));
        // The space belongs to the answer.
        let r = request("ab ", "c", 9, &Tokenizer::bytes()).unwrap();
        assert_eq!((r.tokens, r.scored), (ints("ab "), ints(" c")));
    }

    /// A tokenizer with the letters a and b, the pair ab, and the pair with a space before it; if `adds` is set, `<s>`
    /// precedes every text.
    #[cfg(feature = "text")]
    fn pairs(adds: bool) -> Tokenizer {
        let post_processor = serde_json::json!({
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [5], "tokens": ["<s>"] } },
        });
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [{ "id": 5, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true }],
            "normalizer": null, "pre_tokenizer": null, "decoder": null,
            "post_processor": if adds { post_processor } else { serde_json::Value::Null },
            "model": { "type": "BPE", "vocab": { "a": 0, "b": 1, " ": 2, "ab": 3, " ab": 4 },
                "merges": [["a", "b"], [" ", "ab"]] },
        });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        Tokenizer::open(&path).unwrap()
    }

    #[cfg(feature = "text")]
    #[test]
    fn an_answer_starts_after_as_many_tokens_as_the_prompt_has_alone() {
        let of = |prompt, answer, adds| {
            let r = request(prompt, answer, 9, &pairs(adds)).unwrap();
            (r.tokens, r.scored)
        };
        assert_eq!(of("b", " ab", false), (vec![1], vec![4]));
        // The space at the end of the prompt and the answer form one token.
        assert_eq!(of("b ", "ab", false), (vec![1], vec![4]));
        // If a pair forms across the boundary, the tokens after the first two are scored.
        assert_eq!(of("ba", "bb", false), (vec![1, 3], vec![1]));
        // At least the last token is scored.
        assert_eq!(of("ba", "b", false), (vec![1], vec![3]));
        // A token that the tokenizer adds before a text belongs to the prompt.
        assert_eq!(of("b", " ab", true), (vec![5, 1], vec![4]));
        assert_eq!(of("", "ab", true), (vec![5], vec![3]));
        // If prompt and answer form one pair, it follows the token that begins a text.
        assert_eq!(of("a", "b", false), (vec![5], vec![3]));
    }

    #[test]
    fn a_shared_beginning_is_read_once_and_targets_follow_it() {
        let both = [" one", " only"]
            .map(|a| request("a long prompt:", a, 99, &Tokenizer::bytes()).unwrap());
        let mut batch = Batch::default();
        batch.add(&both).unwrap();
        // "a long prompt: on" is the complete first input, and the second continues with "l".
        assert_eq!(batch.tokens, ints("a long prompt: onl"));
        assert_eq!((batch.spans.rows(), batch.spans.longest()), (18, 18));
        let rows: Vec<usize> = batch.targets.iter().map(|t| t.0).collect();
        assert_eq!(rows, [13, 14, 15, 16, 13, 14, 15, 16, 17]);
        let scored: Vec<i32> = batch.targets.iter().map(|t| t.1).collect();
        assert_eq!(scored, ints(" one only"));
        assert_eq!(batch.whole, 17 + 18);
    }
}
