//! The tokenizer of models for which each byte is a token: token n is byte n.
//!
//! Fast tokenizers of transformers represent a byte as a printable character (byte-level BPE, GPT-2): a printable
//! character of Latin-1 represents its own byte; the other bytes are represented, in order, by U+0100 and the following
//! characters. Without merges every byte remains a token, so any text is encoded as its UTF-8 bytes and decoded without
//! loss.

use crate::data::tokenizer::MODEL_INPUTS;
use serde_json::{Map, Value, json};

/// Number of tokens.
pub const VOCABULARY: usize = 256;

/// Returns the content of `tokenizer.json`.
pub fn tokenizer() -> Value {
    let vocabulary: Map<String, Value> = characters()
        .zip(0u8..)
        .map(|(c, byte)| (c.to_string(), byte.into()))
        .collect();
    // The text is not split into words, and nothing is added before it.
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

/// Returns the content of `tokenizer_config.json`, for texts of at most `longest` tokens.
pub fn config(longest: usize) -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "model_input_names": MODEL_INPUTS,
        "model_max_length": longest,
    })
}

/// Returns the character that represents each byte, in order.
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
        // Space, line feed and soft hyphen as in GPT-2.
        for (text, byte) in [("A", 65), ("Ġ", 32), ("Ċ", 10), ("Ń", 0xad), ("ÿ", 255)] {
            assert_eq!(vocabulary[text], byte, "{text}");
        }
    }
}
