//! Finds the most likely intended word for a misspelled one.

/// Returns the candidate that is most similar to `word`; the first if several are equally similar.
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

/// Returns the similarity of two words, from 0 to 1 for equal words.
pub fn similarity(a: &str, b: &str) -> f64 {
    strsim::normalized_damerau_levenshtein(a, b)
}
