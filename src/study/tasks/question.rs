//! The tasks, and how each builds the prompt, the answers and the right answer of a document.

use crate::error::{Error, Result};
use crate::report::nearest;
use serde_json::Value;

/// One benchmark.
#[derive(Clone, Copy)]
pub struct Task {
    /// Name of the task in lm-evaluation-harness.
    pub name: &'static str,
    /// Name of the file with its documents, without `.jsonl`, `.jsonl.zst` or `.jsonl.gz`.
    pub file: &'static str,
    /// Whether the harness also computes `acc_norm`; the improvement is then computed from it.
    pub normalized: bool,
    /// Whether the model must predict a last word, without a choice of answers.
    pub last_word: bool,
    /// Score of random guessing, in percent (METHOD: Improvement Score).
    pub baseline: f64,
    question: fn(&Value) -> Option<Question>,
}

/// One document of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Pairs of a prompt and the answer after it; a single pair if the answer is a last word.
    pub answers: Vec<(String, String)>,
    /// Number of characters of each answer, without the space before it.
    pub lengths: Vec<usize>,
    /// Index of the right answer.
    pub gold: usize,
}

const fn task(
    name: &'static str,
    file: &'static str,
    normalized: bool,
    baseline: f64,
    question: fn(&Value) -> Option<Question>,
) -> Task {
    Task {
        name,
        file,
        normalized,
        last_word: false,
        baseline,
        question,
    }
}

/// Every task, in the order of the report.
pub const TASKS: &[Task] = &[
    task("arc_challenge", "arc_challenge", true, 25.0, ready_made),
    task("arc_easy", "arc_easy", true, 25.0, ready_made),
    task("boolq", "boolq", false, 50.0, boolq),
    task("hellaswag", "hellaswag", true, 25.0, ready_made),
    Task {
        last_word: true,
        ..task("lambada_openai", "lambada", false, 1.0, lambada)
    },
    task("openbookqa", "openbookqa", true, 25.0, openbookqa),
    task("piqa", "piqa", true, 50.0, piqa),
    task("sciq", "sciq", true, 25.0, sciq),
    task("social_iqa", "socialiqa", false, 33.0, social_iqa),
    task("winogrande", "winogrande", false, 50.0, winogrande),
    // There are no files of these to test with; any documents with `query`, `choices` and `gold` can be used.
    task("logiqa", "logiqa", true, 25.0, ready_made),
    task("mathqa", "mathqa", true, 25.0, ready_made),
    task("mmlu", "mmlu", false, 25.0, ready_made),
    task("pubmedqa", "pubmedqa", false, 33.0, ready_made),
];

/// Returns the task with this name.
///
/// # Errors
/// When there is none; the error suggests the nearest name.
pub fn find(name: &str) -> Result<&'static Task> {
    if let Some(task) = TASKS.iter().find(|t| t.name == name) {
        return Ok(task);
    }
    let names: Vec<&str> = TASKS.iter().map(|t| t.name).collect();
    let help = match nearest(name, names.iter().copied()) {
        Some(near) => format!("did you mean {near}?"),
        None => "give names with commas between them, or all".into(),
    };
    Err(Error::usage("tasks", names.join(", "), name, help))
}

impl Task {
    /// Returns the question of a document; `None` if a field is missing or has a wrong type.
    pub fn question(&self, document: &Value) -> Option<Question> {
        let question = (self.question)(document)?;
        let whole = question.gold < question.answers.len();
        (whole && question.answers.iter().all(|(_, a)| !a.is_empty())).then_some(question)
    }
}

/// Combines one prompt with each of the answers, with a space between them.
pub(super) fn behind(prompt: &str, choices: &[&str], gold: usize) -> Question {
    let answers = choices.iter();
    Question {
        answers: answers
            .map(|c| (prompt.to_owned(), format!(" {c}")))
            .collect(),
        lengths: choices.iter().map(|c| c.chars().count()).collect(),
        gold,
    }
}

fn text<'a>(d: &'a Value, key: &str) -> Option<&'a str> {
    d.get(key)?.as_str()
}

fn texts<'a, const N: usize>(d: &'a Value, keys: [&str; N]) -> Option<Vec<&'a str>> {
    keys.into_iter().map(|key| text(d, key)).collect()
}

fn choices(d: &Value) -> Option<Vec<&str>> {
    let choices = d.get("choices")?.as_array()?.iter();
    choices.map(Value::as_str).collect()
}

/// Reads the number of the right answer, counted from 1, which is written as text.
fn counted_from_1(d: &Value, key: &str) -> Option<usize> {
    text(d, key)?.trim().parse::<usize>().ok()?.checked_sub(1)
}

fn gold(d: &Value) -> Option<usize> {
    usize::try_from(d.get("gold")?.as_u64()?).ok()
}

/// Uses `query`, `choices` and `gold` unchanged.
fn ready_made(d: &Value) -> Option<Question> {
    Some(behind(text(d, "query")?, &choices(d)?, gold(d)?))
}

/// In the harness, "no" comes before "yes".
fn boolq(d: &Value) -> Option<Question> {
    let right = *choices(d)?.get(gold(d)?)?;
    let gold = ["no", "yes"].iter().position(|c| *c == right)?;
    Some(behind(text(d, "query")?, &["no", "yes"], gold))
}

fn lambada(d: &Value) -> Option<Question> {
    let word = *choices(d)?.first()?;
    Some(behind(text(d, "query")?, &[word], 0))
}

/// The harness shows only the stem of the question.
fn openbookqa(d: &Value) -> Option<Question> {
    let query = text(d, "query")?;
    let stem = query.strip_prefix("Question: ").unwrap_or(query);
    let stem = stem.strip_suffix("\nAnswer:").unwrap_or(stem);
    Some(behind(stem, &choices(d)?, gold(d)?))
}

fn piqa(d: &Value) -> Option<Question> {
    let prompt = format!("Question: {}\nAnswer:", text(d, "goal")?);
    Some(behind(&prompt, &choices(d)?, gold(d)?))
}

fn sciq(d: &Value) -> Option<Question> {
    let wrong = texts(d, ["distractor1", "distractor2", "distractor3"])?;
    let choices = [wrong, vec![text(d, "correct_answer")?]].concat();
    let support = text(d, "support")?.trim_start();
    let prompt = format!("{support}\nQuestion: {}\nAnswer:", text(d, "question")?);
    Some(behind(&prompt, &choices, 3))
}

fn social_iqa(d: &Value) -> Option<Question> {
    let choices = texts(d, ["answerA", "answerB", "answerC"])?;
    let prompt = format!("Q: {} {}\nA:", text(d, "context")?, text(d, "question")?);
    Some(behind(&prompt, &choices, counted_from_1(d, "label")?))
}

/// Each option in the blank results in one prompt; the text after the blank is scored for both.
fn winogrande(d: &Value) -> Option<Question> {
    let (before, after) = text(d, "sentence")?.split_once('_')?;
    let rest = format!(" {}", after.trim());
    let options = texts(d, ["option1", "option2"])?.into_iter();
    Some(Question {
        answers: options
            .map(|option| (format!("{before}{option}"), rest.clone()))
            .collect(),
        lengths: vec![rest.chars().count() - 1; 2],
        gold: counted_from_1(d, "answer")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn question(task: &str, document: Value) -> Question {
        find(task).unwrap().question(&document).unwrap()
    }

    #[test]
    fn prompts_are_those_of_the_harness() {
        let d = json!({"query": "A -- b\nQuestion: is it?\nAnswer:", "choices": ["yes", "no"], "gold": 0});
        let prompt = "A -- b\nQuestion: is it?\nAnswer:";
        assert_eq!(question("boolq", d), behind(prompt, &["no", "yes"], 1));
        let d = json!({"query": "Question: so\nAnswer:", "choices": ["é", "bc"], "gold": 1});
        let q = question("openbookqa", d);
        assert_eq!(
            (q.answers[0].0.as_str(), &q.lengths[..]),
            ("so", &[1, 2][..])
        );
        let d = json!({"goal": "Sit.", "query": "Goal: Sit.\nAnswer:", "choices": ["a", "b"], "gold": 0});
        assert_eq!(question("piqa", d).answers[0].0, "Question: Sit.\nAnswer:");
        let d = json!({"support": " S.", "question": "q?", "distractor1": "a", "distractor2": "b",
            "distractor3": "c", "correct_answer": "d"});
        let prompt = "S.\nQuestion: q?\nAnswer:";
        assert_eq!(
            question("sciq", d),
            behind(prompt, &["a", "b", "c", "d"], 3)
        );
        let d = json!({"context": "C.", "question": "q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"});
        let q = question("social_iqa", d);
        assert_eq!((q.answers[0].0.as_str(), q.gold), ("Q: C. q?\nA:", 2));
        let d =
            json!({"sentence": "X so _ won it.", "option1": "A", "option2": "B", "answer": "2"});
        let q = question("winogrande", d);
        assert_eq!(q.answers[1], ("X so B".into(), " won it.".into()));
        assert_eq!(q.gold, 1);
        let d = json!({"query": "one two", "choices": ["three"]});
        let q = question("lambada_openai", d.clone());
        assert_eq!(q.answers, [("one two".into(), " three".into())]);
        assert!(find("hellaswag").unwrap().question(&d).is_none());
    }

    #[test]
    fn a_document_whose_right_answer_is_out_of_range_is_rejected() {
        let d = json!({"query": "q", "choices": ["a", "b"], "gold": 2});
        assert!(find("arc_easy").unwrap().question(&d).is_none());
    }

    #[test]
    fn an_unknown_task_is_an_error_that_names_the_nearest() {
        let e = find("helaswag").err().unwrap().to_string();
        assert!(e.contains("did you mean hellaswag"), "{e}");
    }
}
