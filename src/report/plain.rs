//! Rewrites parser errors in terms that the author of the parsed text understands.

/// Names of types in serde, and their description for a file or a command line.
const TYPES: [(&str, &str); 15] = [
    ("usize", "a whole number, 0 or more"),
    ("u64", "a whole number, 0 or more"),
    ("u32", "a whole number, 0 or more"),
    ("u16", "a whole number, 0 or more"),
    ("u8", "a whole number, 0 or more"),
    ("isize", "a whole number"),
    ("i64", "a whole number"),
    ("i32", "a whole number"),
    ("f64", "a number"),
    ("f32", "a number"),
    ("a boolean", "true or false"),
    ("a sequence", "a list"),
    ("a map", "a table"),
    ("string or table", "a string"),
    ("string only", "a string"),
];

/// Messages of the number parsers of the standard library, and their meaning.
const NUMBERS: [(&str, &str); 6] = [
    (
        "invalid digit found in string",
        "expected a whole number, 0 or more",
    ),
    (
        "cannot parse integer from empty string",
        "expected a whole number",
    ),
    (
        "number too large to fit in target type",
        "expected a smaller number",
    ),
    (
        "number too small to fit in target type",
        "expected a larger number",
    ),
    ("invalid float literal", "expected a number"),
    ("cannot parse float from empty string", "expected a number"),
];

/// Replaces the names of Rust types in a parser's message.
pub fn in_plain_words(message: &str) -> String {
    let mut text = message.to_string();
    for (rust, plain) in NUMBERS {
        text = text.replace(rust, plain);
    }
    if let Some(field) = text.strip_prefix("missing field ") {
        return format!("a value for {field}");
    }
    // The expected type is at the end: a message may quote the text before it.
    let at = text
        .rfind("expected ")
        .map_or(0, |at| at + "expected ".len());
    // These three expressions are followed by a length or a name.
    for (rust, plain) in [
        ("an array of length ", "a list of N values"),
        ("struct ", "a table"),
        ("enum ", "a string"),
    ] {
        if let Some(rest) = text[at..].strip_prefix(rust) {
            let (name, rest) = rest.split_at(rest.find(' ').unwrap_or(rest.len()));
            return format!("{}{}{rest}", &text[..at], plain.replace('N', name));
        }
    }
    for (rust, plain) in TYPES {
        let rest = text[at..].strip_prefix(rust);
        if let Some(rest) = rest.filter(|r| !r.starts_with(char::is_alphanumeric)) {
            return format!("{}{plain}{rest}", &text[..at]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::in_plain_words;

    #[test]
    fn names_of_rust_types_are_replaced_and_quoted_text_is_kept() {
        for (message, plain) in [
            ("usize", "a whole number, 0 or more"),
            ("f64", "a number"),
            ("a boolean", "true or false"),
            ("an array of length 2", "a list of 2 values"),
            ("struct Weighted at line 3", "a table at line 3"),
            (
                "invalid type: string \"f64\", expected i64 at line 3",
                "invalid type: string \"f64\", expected a whole number at line 3",
            ),
            ("`f32` or `f64`", "`f32` or `f64`"),
            ("u64s", "u64s"),
            ("invalid float literal", "expected a number"),
            ("missing field `weight`", "a value for `weight`"),
            ("a text without a type", "a text without a type"),
        ] {
            assert_eq!(in_plain_words(message), plain);
        }
    }
}
