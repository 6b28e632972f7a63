//! Tasks put to a model.

use super::documents;
use super::progress::Progress;
use super::question::{Question, Task};
use super::requests::{Batch, Request, requests};
use super::results::{Answer, Results, Score};
use crate::data::Tokenizer;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::report::files::publish;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::time::Instant;

/// A task with its questions, each with its document's number.
pub struct Benchmark {
    pub task: &'static Task,
    pub questions: Vec<(Value, Question)>,
}

/// The first `limit` questions (all if 0) of each task, from `folder`.
///
/// # Errors
/// When a file is missing or damaged, or a line is no document of its task.
pub fn read(tasks: &[&'static Task], folder: &Path, limit: usize) -> Result<Vec<Benchmark>> {
    let tasks = tasks.iter();
    tasks
        .map(|task| {
            Ok(Benchmark {
                task,
                questions: documents::read(folder, task, limit)?,
            })
        })
        .collect()
}

/// How questions are asked.
pub struct Options {
    /// Tokens that go through the model at once.
    pub tokens: usize,
    /// Whether to show no progress.
    pub quiet: bool,
}

/// Puts benchmarks to a model that reads what `tokenizer` makes of text; into `out`, if given, go `scores.json` and for
/// each task `TASK.jsonl`, a line for each question. The model's state is left as it was.
///
/// # Errors
/// When a text cannot be encoded, a token is not the model's, a likelihood is not finite, or a file cannot be written.
pub fn run(
    model: &Model,
    tokenizer: &Tokenizer,
    benchmarks: &[Benchmark],
    options: &Options,
    out: Option<&Path>,
) -> Result<Results> {
    let questions = benchmarks.iter().flat_map(|b| &b.questions);
    let mut progress = Progress::new(questions.map(|(_, question)| question), options.quiet);
    let mut results = Results::default();
    for benchmark in benchmarks {
        let task = benchmark.task;
        let mut pass = Pass {
            model,
            results: &mut results,
            batch: Batch::default(),
            waiting: Vec::new(),
            answers: Vec::new(),
        };
        for (doc_id, question) in &benchmark.questions {
            let requests = requests(question, model.config().sequence_length, tokenizer)?;
            pass.ask(doc_id, question, &requests)?;
            if pass.batch.tokens.len() >= options.tokens {
                pass.flush()?;
            }
            progress.asked(task, question);
        }
        pass.flush()?;
        let answers = pass.answers;
        if let Some(out) = out {
            let lines: Vec<String> = answers.iter().map(|a| json!(a).to_string()).collect();
            write(
                &out.join(format!("{}.jsonl", task.name)),
                &(lines.join("\n") + "\n"),
            )?;
        }
        let score = Score::of(task, &answers);
        progress.scored(&score);
        results.scores.push(score);
    }
    progress.finish();
    // Routing statistics of training must not see these tokens.
    for state in model.layer_states_mut().iter_mut() {
        state.take_stats();
    }
    if let Some(out) = out {
        write(&out.join("scores.json"), &format!("{:#}\n", json!(results)))?;
    }
    Ok(results)
}

fn write(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    publish(path, text)
}

/// Questions of a task on their way through the model.
struct Pass<'a> {
    model: &'a Model,
    results: &'a mut Results,
    batch: Batch,
    /// Questions of the batch, with the scored tokens of each answer.
    waiting: Vec<(&'a Value, &'a Question, Vec<usize>, bool)>,
    answers: Vec<Answer>,
}

impl<'a> Pass<'a> {
    fn ask(
        &mut self,
        doc_id: &'a Value,
        question: &'a Question,
        requests: &[Request],
    ) -> Result<()> {
        self.batch.add(requests)?;
        let scored = requests.iter().map(|r| r.scored.len()).collect();
        let truncated = requests.iter().any(|r| r.truncated);
        self.waiting.push((doc_id, question, scored, truncated));
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        if batch.tokens.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        let scored = self
            .model
            .score(&batch.tokens, batch.spans, &batch.targets)?;
        self.results.seconds += begun.elapsed().as_secs_f64();
        self.results.tokens += batch.tokens.len();
        self.results.unshared_tokens += batch.whole;
        let mut scored = scored.into_iter();
        for (doc_id, question, counts, truncated) in self.waiting.drain(..) {
            let mut likeliest = true;
            let sums = counts.into_iter().map(|n| {
                let tokens = scored.by_ref().take(n);
                tokens.fold(0.0, |sum, token| {
                    likeliest &= token.likeliest;
                    sum + token.log_probability
                })
            });
            let sums = sums.collect();
            let answer = Answer::new(doc_id.clone(), question, sums, likeliest, truncated);
            self.answers.push(answer);
        }
        Ok(())
    }
}
