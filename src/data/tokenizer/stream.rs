//! Decodes tokens to text one by one.

use super::Tokenizer;
use crate::error::Result;

/// Decodes a stream of tokens. It keeps the first bytes of a character until the character is complete, and returns U+FFFD
/// for bytes that cannot become a character.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens of the last returned text, followed by the tokens after it. The former are needed because some decoders
    /// write the first token of a text differently from the later ones.
    held: Vec<i32>,
    /// Number of tokens of `held` whose text was returned completely.
    whole: usize,
    /// Number of bytes of the text of `held` that were returned.
    given: usize,
}

impl<'a> TextStream<'a> {
    /// A stream before its first token.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        TextStream {
            tokenizer,
            held: Vec::new(),
            whole: 0,
            given: 0,
        }
    }

    /// Adds `tokens` and returns the text that became complete.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, tokens: &[i32]) -> Result<String> {
        self.held.extend_from_slice(tokens);
        let text = self.tokenizer.decode(&self.held)?;
        // A character has at most four bytes. For an incomplete character, some decoders write one U+FFFD, others one for
        // each byte.
        let backwards = text.chars().rev();
        let open = backwards
            .take_while(|c| *c == char::REPLACEMENT_CHARACTER)
            .count()
            .min(3);
        let sure = text.len() - open * char::REPLACEMENT_CHARACTER.len_utf8();
        let new = text.get(self.given..sure).unwrap_or_default().to_string();
        self.given += new.len();
        if open == 0 {
            self.held.drain(..self.whole);
            self.whole = self.held.len();
            self.given = self.tokenizer.decode(&self.held)?.len();
        }
        Ok(new)
    }

    /// Returns the text that was kept back.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.held)?;
        match text.get(self.given..) {
            Some(rest) => Ok(rest.to_string()),
            // For some decoders, complete characters before an incomplete one are incomplete too.
            None => self.tokenizer.decode(&self.held[self.whole..]),
        }
    }
}
