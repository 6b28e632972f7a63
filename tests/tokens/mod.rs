//! A tiny tokenizer.json and tiny parquet files, for tests.

#![allow(dead_code)]

use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What stands for each byte in a byte-level vocabulary (GPT-2).
fn characters() -> impl Iterator<Item = char> {
    let mut others = '\u{100}'..;
    (0u8..=255).filter_map(move |byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => Some(char::from(byte)),
        _ => others.next(),
    })
}

pub const BOS: &str = "<|begin_of_text|>";
pub const EOS: &str = "<|end_of_text|>";

/// Byte-level BPE with a few merges and `extra` tokens that no text becomes, then BOS and EOS.
pub fn tokenizer(folder: &Path, extra: usize) -> PathBuf {
    let mut tokens: Vec<String> = characters().map(|c| c.to_string()).collect();
    let merges = ["Ġ w", "o r", "Ġw or", "Ġwor d", "i n", "e r"];
    tokens.extend(merges.iter().map(|m| m.replace(' ', "")));
    tokens.extend((0..extra).map(|i| format!("extra{i}é")));
    let n = tokens.len();
    let vocabulary: Map<String, Value> = tokens
        .into_iter()
        .enumerate()
        .map(|(i, t)| (t, json!(i)))
        .collect();
    let special = |id: usize, name: &str| {
        json!({
            "id": id, "content": name, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        })
    };
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    let value = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(n, BOS), special(n + 1, EOS)],
        "normalizer": null,
        "pre_tokenizer": bytes,
        "post_processor": null,
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocabulary, "merges": merges,
        },
    });
    let path = folder.join("tokenizer.json");
    fs::write(&path, value.to_string()).unwrap();
    path
}

/// Texts of different kinds, the n-th of them from source `s(n % 3)`.
pub fn documents(n: usize) -> Vec<(String, String)> {
    (0..n)
        .map(|i| {
            let words = (0..10 + i * 7 % 90).map(|w| format!(" word{}", (i * w + w) % 23));
            let mut text = format!("Document {i} é€ über\n<|end_of_text|>");
            text.extend(words);
            (text, format!("s{}", i % 3))
        })
        .collect()
}

/// FineWeb's columns, as far as they matter, in row groups of `rows`; a text may be none.
pub fn parquet(path: &Path, documents: &[(Option<&str>, &str)], rows: usize) {
    let codec = parquet::basic::Compression::ZSTD(Default::default());
    parquet_with(codec, path, documents, rows);
}

/// [`parquet`], compressed with `codec`.
pub fn parquet_with(
    codec: parquet::basic::Compression,
    path: &Path,
    documents: &[(Option<&str>, &str)],
    rows: usize,
) {
    let schema = "message m { optional binary text (UTF8); required int64 token_count; optional binary dump (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder()
        .set_compression(codec)
        .set_data_page_row_count_limit(7)
        .set_write_batch_size(7)
        .build();
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    // Writers that filter may leave empty groups.
    for group in [&documents[..0]].into_iter().chain(documents.chunks(rows)) {
        let mut to = writer.next_row_group().unwrap();
        let column = |values: Vec<Option<&str>>| {
            let levels: Vec<i16> = values.iter().map(|v| i16::from(v.is_some())).collect();
            let values: Vec<ByteArray> =
                values.into_iter().flatten().map(ByteArray::from).collect();
            (levels, values)
        };
        let (levels, values) = column(group.iter().map(|d| d.0).collect());
        let mut text = to.next_column().unwrap().unwrap();
        text.typed::<ByteArrayType>()
            .write_batch(&values, Some(&levels), None)
            .unwrap();
        text.close().unwrap();
        let mut counts = to.next_column().unwrap().unwrap();
        let numbers: Vec<i64> = (0..group.len() as i64).collect();
        counts
            .typed::<parquet::data_type::Int64Type>()
            .write_batch(&numbers, None, None)
            .unwrap();
        counts.close().unwrap();
        let (levels, values) = column(group.iter().map(|d| Some(d.1)).collect());
        let mut dump = to.next_column().unwrap().unwrap();
        dump.typed::<ByteArrayType>()
            .write_batch(&values, Some(&levels), None)
            .unwrap();
        dump.close().unwrap();
        to.close().unwrap();
    }
    writer.close().unwrap();
}

/// [`documents`] as parquet.
pub fn parquet_of(path: &Path, documents: &[(String, String)], rows: usize) {
    let rows_of: Vec<(Option<&str>, &str)> = documents
        .iter()
        .map(|(text, source)| (Some(text.as_str()), source.as_str()))
        .collect();
    parquet(path, &rows_of, rows);
}

/// [`documents`] as JSON lines.
pub fn json_lines(documents: &[(String, String)]) -> String {
    let lines = documents
        .iter()
        .map(|(text, source)| json!({ "text": text, "dump": source }).to_string() + "\n");
    lines.collect()
}
