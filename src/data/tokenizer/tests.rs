use super::*;

#[test]
fn each_byte_is_a_token_and_decodes_again() {
    let bytes = Tokenizer::bytes();
    assert_eq!(bytes.encode("aé").unwrap(), [97, 0xc3, 0xa9]);
    assert_eq!(bytes.decode(&[97, 0xc3, 0xa9]).unwrap(), "aé");
    assert_eq!(
        (bytes.vocab_size(), bytes.bos(), bytes.eos()),
        (256, None, None)
    );
    for token in [-1, 256] {
        let e = bytes.decode(&[token]).unwrap_err().to_string();
        assert!(e.contains("below the vocabulary of 256"), "{e}");
    }
}

#[test]
fn characters_are_returned_complete_and_broken_ones_are_marked() {
    let bytes = Tokenizer::bytes();
    let mut stream = TextStream::new(&bytes);
    let mut text = String::new();
    for byte in "a é€".bytes().chain([0xff, b'b', 0xe2, b'c', 0xff, 0xff]) {
        text += &stream.push(&[i32::from(byte)]).unwrap();
    }
    // Text that can still change is not returned yet.
    assert_eq!(text, "a é€\u{fffd}b\u{fffd}c");
    for byte in [0xe2, 0x82] {
        text += &stream.push(&[byte]).unwrap();
    }
    text += &stream.finish().unwrap();
    assert_eq!(text, "a é€\u{fffd}b\u{fffd}c\u{fffd}\u{fffd}\u{fffd}");
}

#[cfg(not(feature = "text"))]
#[test]
fn the_error_of_a_build_without_the_feature_names_it() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(TOKENIZER_FILE), "{}").unwrap();
    let e = Tokenizer::of_folder(folder.path()).err().unwrap();
    assert!(e.to_string().contains("build with --features text"), "{e}");
}

#[cfg(feature = "text")]
mod file {
    use super::*;
    use std::fs;

    /// Writes a tokenizer with a small vocabulary; as in SentencePiece, U+2581 stands for the space before a word.
    fn write(folder: &Path, added: &[(u32, &str)]) -> std::path::PathBuf {
        let added = added.iter().map(|(id, name)| {
            serde_json::json!({
                "id": id, "content": name, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            })
        });
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": null,
            "pre_tokenizer": { "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true },
            "post_processor": null,
            "decoder": { "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true },
            "model": { "type": "WordLevel", "unk_token": "<unk>", "vocab": { "<unk>": 0, "▁one": 1, "▁two": 2 } },
        });
        let path = folder.join(TOKENIZER_FILE);
        fs::write(&path, json.to_string()).unwrap();
        path
    }

    /// The tokenizer with these special tokens.
    fn with(added: &[(u32, &str)]) -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        Tokenizer::open(&write(folder.path(), added)).unwrap()
    }

    #[test]
    fn a_file_encodes_decodes_and_names_its_first_and_last_token() {
        let t = with(&[(3, "<s>"), (4, "</s>")]);
        assert_eq!((t.vocab_size(), t.bos(), t.eos()), (5, Some(3), Some(4)));
        assert_eq!(t.encode("two one").unwrap(), [2, 1]);
        assert_eq!(t.decode(&[3, 2, 1, 4]).unwrap(), "<s> two one</s>");
        // A decoder that removes the first space of a text must keep the spaces between tokens.
        let mut stream = TextStream::new(&t);
        let parts: Vec<String> = [2, 1, 1, 2].map(|t| stream.push(&[t]).unwrap()).into();
        assert_eq!(parts, ["two", " one", " one", " two"]);
    }

    /// Writes a vocabulary of single bytes, named as SentencePiece names the bytes of unknown characters.
    fn with_byte_fallback() -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        let bytes = [0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80].map(|b: u8| format!("<0x{b:02X}>"));
        let names = bytes.into_iter().chain(["a".to_string()]);
        let vocab: serde_json::Map<_, _> = names.zip((0..).map(serde_json::Value::from)).collect();
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [],
            "decoder": { "type": "Sequence", "decoders": [{ "type": "ByteFallback" }, { "type": "Fuse" }] },
            "model": { "type": "WordLevel", "unk_token": "a", "vocab": vocab },
        });
        let path = folder.path().join(TOKENIZER_FILE);
        fs::write(&path, json.to_string()).unwrap();
        Tokenizer::open(&path).unwrap()
    }

    #[test]
    fn characters_of_several_tokens_are_returned_complete() {
        let t = with_byte_fallback();
        // €, a, 😀, and a € that is cut off.
        let tokens = [0, 1, 2, 7, 3, 4, 5, 6, 0, 1];
        let mut stream = TextStream::new(&t);
        let parts: Vec<String> = tokens.map(|t| stream.push(&[t]).unwrap()).into();
        assert_eq!(parts, ["", "", "€", "a", "", "", "", "😀", "", ""]);
        assert_eq!(stream.finish().unwrap(), "\u{fffd}\u{fffd}");
        // Bytes that cannot become a character are not kept back forever.
        let mut stream = TextStream::new(&t);
        let parts: Vec<String> = [1; 5].map(|t| stream.push(&[t]).unwrap()).into();
        assert_eq!(parts, ["", "", "", "\u{fffd}", "\u{fffd}"]);
    }

    #[test]
    fn a_token_that_ends_texts_begins_them_only_if_the_file_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), &[(3, "<end>")]);
        for (adds, bos) in [(None, None), (Some(false), None), (Some(true), Some(3))] {
            let config = serde_json::json!({ "bos_token": "<end>", "eos_token": "<end>", "add_bos_token": adds });
            fs::write(
                folder.path().join(TOKENIZER_CONFIG_FILE),
                config.to_string(),
            )
            .unwrap();
            let t = Tokenizer::open(&path).unwrap();
            assert_eq!((t.bos(), t.eos()), (bos, Some(3)), "{adds:?}");
        }
    }

    #[test]
    fn text_never_becomes_a_special_token() {
        let t = with(&[(3, "</s>")]);
        assert_eq!(t.encode("one </s>").unwrap(), [1, 0]);
    }

    #[test]
    fn the_files_of_a_tokenizer_restore_it_with_its_first_and_last_token() {
        let mut t = with(&[(3, "<s>"), (4, "<end>")]);
        assert_eq!(t.eos(), None);
        t.set_special(true, Some("<end>")).unwrap();
        t.set_special(false, None).unwrap();
        let copy = tempfile::tempdir().unwrap();
        for (name, content) in t.files() {
            fs::write(copy.path().join(name), content).unwrap();
        }
        let again = Tokenizer::of_folder(copy.path()).unwrap();
        assert_eq!((again.bos(), again.eos()), (None, Some(4)));
        assert_eq!(again.fingerprint(), t.fingerprint());
        let e = t.set_special(true, Some("<nobody>")).unwrap_err();
        assert!(e.to_string().contains("--eos"), "{e}");
    }

    #[test]
    fn the_error_for_a_file_that_is_not_a_tokenizer_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(TOKENIZER_FILE);
        for text in ["", "{}", "[1]", "\u{0}", "{\"model\": 3}"] {
            fs::write(&path, text).unwrap();
            let e = Tokenizer::open(&path).err().unwrap().to_string();
            assert!(e.contains("expected a tokenizer"), "{e}");
        }
        write(folder.path(), &[(3, "<s>")]);
        let config = folder.path().join(TOKENIZER_CONFIG_FILE);
        fs::write(config, "{\"eos_token\": \"<none>\"}").unwrap();
        let e = Tokenizer::open(&path).err().unwrap().to_string();
        assert!(
            e.contains("tokenizer_config.json") && e.contains("`<none>`"),
            "{e}"
        );
    }
}
