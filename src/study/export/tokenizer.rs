//! The tokenizer of models whose tokens are bytes: token n is byte n.
//!
//! transformers' fast tokenizers write a byte as a printable character (byte-level BPE, GPT-2): the
//! printable ones of Latin-1 stand for themselves, the others in order for U+0100 and up. Without
//! merges every byte stays a token, so that any text has its UTF-8 as tokens, and back.

use crate::data::tokenizer::MODEL_INPUTS;
use serde_json::{Map, Value, json};

/// Tokens.
pub const VOCABULARY: usize = 256;

/// `tokenizer.json`.
pub fn tokenizer() -> Value {
    let vocabulary: Map<String, Value> = characters()
        .zip(0u8..)
        .map(|(c, byte)| (c.to_string(), byte.into()))
        .collect();
    // The text is not cut at words, and nothing is put before it.
    let bytes = json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": false,
        "use_regex": false,
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": bytes,
        "post_processor": null,
        "decoder": bytes,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": [],
        },
    })
}

/// `tokenizer_config.json`, for texts of `longest` tokens.
pub fn config(longest: usize) -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "model_input_names": MODEL_INPUTS,
        "model_max_length": longest,
    })
}

/// The character that stands for each byte.
fn characters() -> impl Iterator<Item = char> {
    let mut others = '\u{100}'..;
    (0u8..=255).filter_map(move |byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => Some(char::from(byte)),
        _ => others.next(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_byte_is_the_token_of_its_number() {
        let tokenizer = tokenizer();
        let vocabulary = tokenizer["model"]["vocab"].as_object().unwrap();
        let ids: BTreeSet<u64> = vocabulary.values().map(|v| v.as_u64().unwrap()).collect();
        assert_eq!(ids, (0..256).collect());
        // Space, line feed and soft hyphen as GPT-2 writes them.
        for (text, byte) in [("A", 65), ("Ġ", 32), ("Ċ", 10), ("Ń", 0xad), ("ÿ", 255)] {
            assert_eq!(vocabulary[text], byte, "{text}");
        }
    }
}
