//! The word that a misspelt one was most likely meant to be.

/// The candidate that looks most like `word`; the first of equals.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let mut best: Option<(f64, &str)> = None;
    for candidate in candidates {
        let s = similarity(word, candidate);
        if best.is_none_or(|(b, _)| s > b) {
            best = Some((s, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

/// 1 for equal words, down to 0.
pub fn similarity(a: &str, b: &str) -> f64 {
    strsim::normalized_damerau_levenshtein(a, b)
}
