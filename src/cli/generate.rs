//! `routegrad generate`: continues a prompt.

use super::saved::open_saved;
use crate::error::{Error, Result};
use crate::report::stderr_line;
use crate::study::generate;
use clap::Args;
use std::fs;
use std::path::PathBuf;

#[derive(Args)]
pub(super) struct GenerateArgs {
    /// Run, one of its checkpoints, or a model folder of transformers.
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// Text to continue.
    #[arg(long, value_name = "TEXT", default_value = "My fellow citizens, ")]
    pub(super) prompt: String,
    /// File with the text to continue, or - for the standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub(super) prompt_file: Option<PathBuf>,
    /// Number of continuations.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) samples: u32,
    /// Number of tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 400)]
    pub(super) tokens: usize,
    /// Temperature, by which the logits are divided; 0 selects the most probable token.
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    pub(super) temperature: f64,
    /// Sample from the K most probable tokens; 0 for all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub(super) top_k: usize,
    /// Seed of the sampling.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) seed: u64,
}

pub(super) fn generate_command(args: &GenerateArgs) -> Result<()> {
    let sampling = generate::Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        seed: args.seed,
        samples: args.samples as usize,
    };
    let prompt = match &args.prompt_file {
        None => args.prompt.clone(),
        Some(file) if file.as_os_str() == "-" => std::io::read_to_string(std::io::stdin())
            .map_err(|e| Error::io("read", "the standard input", e))?,
        Some(file) => fs::read_to_string(file).map_err(|e| Error::io("read", file, e))?,
    };
    let found = open_saved(&args.model)?;
    let mut out = std::io::stdout().lock();
    let made = generate::run(&found, &prompt, args.tokens, &sampling, &mut out)?;
    let (tokens, seconds) = (made.tokens, made.seconds);
    stderr_line(&format!(
        "{tokens} tokens in {seconds:.1} s, {:.0} per second",
        tokens as f64 / seconds
    ));
    Ok(())
}
