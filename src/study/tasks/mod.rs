//! Benchmark scores as lm-evaluation-harness 0.4 computes them, zero-shot: the answers of a question are ranked by their
//! likelihood under the model, given the prompt.
//!
//! - `acc`: whether the most likely answer is the right one.
//! - `acc_norm`: as `acc`, with log-likelihoods divided by the answer's length in characters.
//! - `perplexity` (LAMBADA): e^(−mean log-likelihood of the last word). For this task, `acc` is whether the model would
//!   generate the word.
//!
//! Standard errors are √(s² / n) with s² over n − 1; that of the perplexity is the perplexity times
//! the standard error of the mean log-likelihood (the harness draws bootstrap samples instead).

mod documents;
mod progress;
mod question;
mod requests;
mod results;
mod run;
mod table;

pub use documents::choose;
pub use question::{Question, TASKS, Task, find};
pub(super) use requests::beginning;
pub use results::{Answer, Results, Score, Value};
pub use run::{Benchmark, Options, check_alike, read, run};
