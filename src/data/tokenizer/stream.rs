//! Tokens as text, as they come.

use super::Tokenizer;
use crate::error::Result;

/// Turns tokens into text one by one: holds back the beginning of a character until its end has
/// come, and gives U+FFFD for what can become none.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens of the last text that was given, since some decoders write the first token of a
    /// text in another way than those behind it, and those that came after them.
    held: Vec<i32>,
    /// Tokens of `held` whose text was given whole.
    whole: usize,
    /// Bytes of the text of `held` that were given.
    given: usize,
}

impl<'a> TextStream<'a> {
    /// Before the first token.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        TextStream {
            tokenizer,
            held: Vec::new(),
            whole: 0,
            given: 0,
        }
    }

    /// The text that `tokens` add.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, tokens: &[i32]) -> Result<String> {
        self.held.extend_from_slice(tokens);
        let text = self.tokenizer.decode(&self.held)?;
        // A character has at most four bytes. Some decoders write U+FFFD once for those of one that have come, others once for
        // each of them.
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

    /// What was held back.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.held)?;
        match text.get(self.given..) {
            Some(rest) => Ok(rest.to_string()),
            // Some decoders read whole characters before a broken one as broken too.
            None => self.tokenizer.decode(&self.held[self.whole..]),
        }
    }
}
