//! Scores a model on tasks.

use super::documents;
use super::progress::Progress;
use super::question::{Question, Task};
use super::requests::{Batch, Request, requests};
use super::results::{Answer, Results, Score};
use crate::config::Config;
use crate::data::Tokenizer;
use crate::dist::{Collective, same_on_all};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::report::files::publish;
use crate::study::eval::gathered;
use crate::train;
use serde_json::{Value, json};
use std::fs;
use std::mem::take;
use std::path::Path;
use std::time::Instant;

/// A task with its questions, each with the number of its document.
pub struct Benchmark {
    /// The task.
    pub task: &'static Task,
    /// Document numbers and questions, in the order of the file.
    pub questions: Vec<(Value, Question)>,
}

/// Reads the first `limit` questions (all if 0) of each task from `folder`.
///
/// # Errors
/// When a file is missing or damaged, or a line is not a document of its task.
pub fn read(tasks: &[&'static Task], folder: &Path, limit: usize) -> Result<Vec<Benchmark>> {
    let benchmark = |task: &&'static Task| {
        let questions = documents::read(folder, task, limit)?;
        Ok(Benchmark { task, questions })
    };
    tasks.iter().map(benchmark).collect()
}

/// Compares the program, the configuration and the questions of all ranks.
///
/// # Errors
/// When two ranks differ.
pub fn check_alike(dist: &dyn Collective, config: &Config, benchmarks: &[Benchmark]) -> Result<()> {
    train::check_alike(dist, config)?;
    let mut hasher = blake3::Hasher::new();
    for Benchmark { task, questions } in benchmarks {
        hasher.update(task.name.as_bytes());
        for question in questions {
            hasher.update(format!("{question:?}").as_bytes());
        }
    }
    let both = |a: &str, b: &str| format!("questions with the digests {a} and {b}");
    let help = "give every host the same files of --task-data";
    same_on_all(dist, &hasher.finalize().to_hex(), both, help)
}

/// Options of the scoring.
pub struct Options {
    /// Number of tokens per forward pass.
    pub tokens: usize,
    /// Whether to hide progress.
    pub quiet: bool,
}

/// Scores a model on benchmarks, with `tokenizer` to encode the text. If `out` is given, writes `scores.json` and, for
/// each task, `TASK.jsonl` with one line per question to it. The model's state is not changed.
///
/// # Errors
/// When a text cannot be encoded, a token is not in the model's vocabulary, a likelihood is not finite, or a file cannot
/// be written.
pub fn run(
    model: &Model,
    tokenizer: &Tokenizer,
    benchmarks: &[Benchmark],
    options: &Options,
    out: Option<&Path>,
) -> Result<Results> {
    let results = scored(model, tokenizer, benchmarks, options, out);
    // The routing statistics of training must not include these tokens.
    for state in model.layer_states_mut().iter_mut() {
        state.take_stats();
    }
    let results = results?;
    if let Some(out) = out {
        write(&out.join("scores.json"), &format!("{:#}\n", json!(results)))?;
    }
    Ok(results)
}

/// Scores a model as [`run`] does.
fn scored(
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
            done: Vec::new(),
            own: Vec::new(),
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
        let answers = pass.answers()?;
        if let Some(out) = out {
            let lines: Vec<String> = answers.iter().map(|a| json!(a).to_string()).collect();
            let file = out.join(format!("{}.jsonl", task.name));
            write(&file, &(lines.join("\n") + "\n"))?;
        }
        let score = Score::of(task, &answers);
        progress.scored(&score);
        results.scores.push(score);
    }
    Ok(results)
}

fn write(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    publish(path, text)
}

/// A question in a batch.
struct Waiting<'a> {
    doc_id: &'a Value,
    question: &'a Question,
    /// Number of scored tokens of each answer.
    scored: Vec<usize>,
    truncated: bool,
}

/// Passes the questions of a task through the model. Ranks process the batches in turn.
struct Pass<'a> {
    model: &'a Model,
    results: &'a mut Results,
    batch: Batch,
    waiting: Vec<Waiting<'a>>,
    /// Number of questions of the finished batches of all ranks.
    done: Vec<Vec<Waiting<'a>>>,
    /// For each question in this rank's finished batches: the log-likelihoods of its answers, and 1 if every token was the
    /// most likely one.
    own: Vec<f64>,
}

impl<'a> Pass<'a> {
    fn ask(
        &mut self,
        doc_id: &'a Value,
        question: &'a Question,
        requests: &[Request],
    ) -> Result<()> {
        self.batch.add(requests)?;
        self.waiting.push(Waiting {
            doc_id,
            question,
            scored: requests.iter().map(|r| r.scored.len()).collect(),
            truncated: requests.iter().any(|r| r.truncated),
        });
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let (batch, waiting) = (take(&mut self.batch), take(&mut self.waiting));
        if batch.tokens.is_empty() {
            return Ok(());
        }
        self.results.tokens += batch.tokens.len();
        self.results.unshared_tokens += batch.whole;
        let dist = self.model.dist();
        if self.done.len() % dist.size() == dist.rank() {
            let begun = Instant::now();
            self.score(batch, &waiting)?;
            self.results.seconds += begun.elapsed().as_secs_f64();
        }
        self.done.push(waiting);
        Ok(())
    }

    fn score(&mut self, batch: Batch, waiting: &[Waiting]) -> Result<()> {
        let scored = match self.model.score(&batch.tokens, batch.spans, &batch.targets) {
            // The other ranks learn of an error when the results are gathered.
            Err(Error::NonFinite { .. }) => Vec::new(),
            scored => scored?,
        };
        let mut scored = scored.into_iter();
        for question in waiting {
            let mut likeliest = true;
            for n in &question.scored {
                let mut sum = 0.0;
                for _ in 0..*n {
                    let token = scored.next();
                    likeliest &= token.is_some_and(|t| t.likeliest);
                    sum += token.map_or(f64::NAN, |t| t.log_probability);
                }
                self.own.push(sum);
            }
            self.own.push(f64::from(u8::from(likeliest)));
        }
        Ok(())
    }

    /// Returns the answers of all ranks, in the order of the questions.
    fn answers(self) -> Result<Vec<Answer>> {
        let dist = self.model.dist();
        let mut ranks = gathered(dist, &self.own)?;
        let mut answers = Vec::new();
        for (i, questions) in self.done.into_iter().enumerate() {
            let numbers = &mut ranks[i % dist.size()];
            for Waiting {
                doc_id,
                question,
                scored,
                truncated,
            } in questions
            {
                let sums: Vec<f64> = numbers.take(scored.len()).collect();
                if sums.len() != scored.len() || sums.iter().any(|sum| sum.is_nan()) {
                    return Err(Error::NonFinite {
                        what: format!("a likelihood of document {doc_id}"),
                        help: "the model diverged: use an earlier checkpoint".into(),
                    });
                }
                let likeliest = numbers.next() == Some(1.0);
                let answer = Answer::new(doc_id.clone(), question, sums, likeliest, truncated);
                answers.push(answer);
            }
        }
        Ok(answers)
    }
}
