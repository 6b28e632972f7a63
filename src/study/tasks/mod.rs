//! Benchmark scores as lm-evaluation-harness 0.4 computes them, zero-shot: a question's answers are
//! ranked by the likelihood that the model gives them behind its prompt.
//!
//! - `acc`: the likeliest answer is the right one.
//! - `acc_norm`: the same with log-likelihoods divided by the answer's length in characters.
//! - `perplexity` (LAMBADA): e^(−mean log-likelihood of the last word); its `acc` asks whether the
//!   word is what the model would write.
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
pub use results::{Answer, Results, Score, Value};
pub use run::{Benchmark, Options, check_alike, read, run};
