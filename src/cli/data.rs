//! `routegrad data`: tokenizes files of documents, and shows the result.

use crate::config::{Config, Layers, PRESETS};
use crate::data::folder::{Counts, Folder, Side};
use crate::data::prepare::{self, Options};
use crate::error::{Error, Result};
use crate::report::progress::Phases;
use crate::report::stderr_line;
use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Subcommand)]
pub(super) enum Command {
    /// Tokenize parquet, JSON lines or text files into a folder for `train --data`.
    ///
    /// If the command is killed, run it again to continue.
    #[command(after_help = "\
Examples:
  routegrad data prepare fineweb-edu/ --tokenizer llama-3/tokenizer.json --out tokens/fineweb-edu
  routegrad data prepare books.jsonl.zst --text-column content --validation held-out.jsonl --out tokens/books
  routegrad data prepare my-texts/ --out tokens/bytes")]
    Prepare(PrepareArgs),
    /// Show the counts, sources and some documents of a folder of tokens.
    #[command(after_help = "\
Examples:
  routegrad data inspect tokens/fineweb-edu
  routegrad data inspect tokens/fineweb-edu --verify --samples 5")]
    Inspect(InspectArgs),
}

#[derive(Args)]
pub(super) struct PrepareArgs {
    /// Files that end in .parquet, .jsonl, .json (JSON lines) or .txt, or folders of such files. All but parquet may be
    /// compressed, with the ending .zst or .gz.
    #[arg(value_name = "INPUT", required = true)]
    inputs: Vec<PathBuf>,
    /// New folder for the tokens.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// tokenizer.json of Hugging Face, or its folder [default: one token for each byte].
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Token before each document; `none` for no token [default: the BOS token of the tokenizer, if it has one].
    #[arg(long, value_name = "NAME")]
    bos: Option<String>,
    /// Token after each document; `none` for no token [default: the EOS token of the tokenizer, if it has one; without
    /// a tokenizer, three line feeds].
    #[arg(long, value_name = "NAME")]
    eos: Option<String>,
    /// Share of the documents that is held out for validation, spread evenly.
    #[arg(
        long,
        value_name = "SHARE",
        default_value_t = 0.005,
        conflicts_with = "validation"
    )]
    validation_fraction: f64,
    /// File or folder with the validation documents, instead of a share of the input; can be repeated.
    #[arg(long, value_name = "INPUT")]
    validation: Vec<PathBuf>,
    /// Parquet column or JSON field that contains the text.
    #[arg(long, value_name = "NAME", default_value = "text")]
    text_column: String,
    /// Parquet column or JSON field that names the source of a document [default: dump if present, else the file name].
    #[arg(long, value_name = "NAME")]
    source_column: Option<String>,
    /// Separator of the documents of a text file, with \n for a line feed; if empty, a file is one document.
    #[arg(long, value_name = "TEXT", default_value = r"\n\n\n")]
    separator: String,
    /// Tokens per shard; at most one shard of work is lost if the command is killed.
    #[arg(long, value_name = "N", default_value_t = 1 << 26)]
    shard_tokens: u64,
    /// Fail at a document that cannot be read, instead of leaving it out.
    #[arg(long)]
    strict: bool,
    /// Decode every document and count those whose text is not restored exactly.
    #[arg(long)]
    round_trip: bool,
    /// Show no progress.
    #[arg(long)]
    quiet: bool,
}

#[derive(Args)]
pub(super) struct InspectArgs {
    /// Folder that `data prepare` created.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Compare every file with its checksum.
    #[arg(long)]
    verify: bool,
    /// Show the beginnings of this many training documents and this many validation documents, spread evenly.
    #[arg(long, value_name = "N", default_value_t = 2)]
    samples: usize,
}

pub(super) fn run(command: Command) -> Result<()> {
    match command {
        Command::Prepare(args) => prepare(args),
        Command::Inspect(args) => inspect(&args),
    }
}

fn prepare(args: PrepareArgs) -> Result<()> {
    let options = Options {
        inputs: args.inputs,
        validation: args.validation,
        out: args.out,
        tokenizer: args.tokenizer,
        bos: args.bos,
        eos: args.eos,
        validation_fraction: args.validation_fraction,
        text_column: args.text_column,
        source_column: args.source_column,
        separator: args.separator.replace(r"\n", "\n").replace(r"\t", "\t"),
        shard_tokens: args.shard_tokens,
        strict: args.strict,
        round_trip: args.round_trip,
        quiet: args.quiet,
    };
    let summary = prepare::run(&options)?;
    let manifest = summary.manifest;
    say!("{}", row("training", manifest.counts(Side::Train)));
    say!("{}", row("validation", manifest.counts(Side::Validation)));
    say!("{}", left_out(manifest.empty, manifest.unreadable));
    if options.round_trip {
        say!("decoding changes the text of {} documents", summary.altered);
    }
    let megabytes = summary.bytes as f64 / 1e6;
    let (rate, seconds) = (megabytes / summary.seconds, summary.seconds);
    say!("{megabytes:.1} MB of text in {seconds:.1} s, {rate:.1} MB/s");
    let out = options.out.display();
    say!("train on it: routegrad train --data {out}");
    for side in Side::BOTH {
        if let Some(warning) = too_short(side, manifest.counts(side).tokens)? {
            stderr_line(&warning);
        }
    }
    match summary.cut.as_slice() {
        [] => Ok(()),
        [first, others @ ..] => {
            let more = match others.len() {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            Err(Error::invalid(
                "data prepare",
                "files that can be read to their end",
                format!("{}{more}, of which the rest was left out", first.display()),
                format!(
                    "copy the files again and prepare another folder, or use {out}, which contains the documents that could be read"
                ),
            ))
        }
    }
}

/// Returns a warning if a side has too few tokens for one sequence of a preset; `train` then refuses the folder.
fn too_short(side: Side, tokens: u64) -> Result<Option<String>> {
    let mut short = Vec::new();
    for (preset, _) in PRESETS {
        let length = Config::load(&Layers::preset(preset), &|_| Ok(()))?;
        let length = length.model.sequence_length;
        if tokens <= length as u64 {
            short.push(format!("{preset} {length}"));
        }
    }
    if short.is_empty() {
        return Ok(None);
    }
    let (what, more) = match side {
        Side::Train => ("training", "prepare more text"),
        Side::Validation => (
            "held-out",
            "hold out more text with --validation-fraction or --validation",
        ),
    };
    let shorter = match tokens {
        0 | 1 => String::new(),
        n => format!(", or train with --sequence-length {} or less", n - 1),
    };
    Ok(Some(format!(
        "warning: the {what} part has {tokens} tokens, and training needs one more than model.sequence_length there: too few \
         for the presets {}; {more}{shorter}",
        short.join(", ")
    )))
}

fn row(name: &str, counts: Counts) -> String {
    let Counts {
        documents,
        tokens,
        bytes,
    } = counts;
    let each = bytes as f64 / (tokens.max(1)) as f64;
    let megabytes = bytes as f64 / 1e6;
    format!(
        "{name:<24} {documents:>10} documents {tokens:>14} tokens {megabytes:>10.1} MB  {each:.2} bytes/token"
    )
}

fn left_out(empty: u64, unreadable: u64) -> String {
    format!("left out: {empty} documents without text, {unreadable} that could not be read")
}

fn inspect(args: &InspectArgs) -> Result<()> {
    let folder = Folder::open(&args.folder)?;
    let manifest = folder.manifest();
    say!(
        "tokenizer   {}, {} tokens",
        manifest.tokenizer,
        manifest.vocab_size
    );
    let (before, after) = (&manifest.before, &manifest.after);
    say!("around each document {before:?} … {after:?}");
    let (shards, width) = (manifest.shards.len(), manifest.token_bytes);
    say!("shards      {shards}, {width} bytes a token");
    for side in Side::BOTH {
        let name = match side {
            Side::Train => "training",
            Side::Validation => "validation",
        };
        say!("{}", row(name, manifest.counts(side)));
        for source in &manifest.sources {
            let counts = match side {
                Side::Train => source.train,
                Side::Validation => source.validation,
            };
            if manifest.sources.len() > 1 && counts.documents > 0 {
                say!("{}", row(&format!("  {}", source.name), counts));
            }
        }
    }
    say!("{}", left_out(manifest.empty, manifest.unreadable));
    if args.samples > 0 {
        samples(&folder, args.samples)?;
    }
    if args.verify {
        let phases = Phases::new(1);
        phases.begin(1, "comparing checksums");
        folder.verify()?;
        drop(phases);
        say!("every file agrees with its checksum");
    }
    Ok(())
}

fn samples(folder: &Folder, count: usize) -> Result<()> {
    let tokenizer = folder.tokenizer()?;
    for side in Side::BOTH {
        let documents = folder.documents(side)?;
        let n = documents.len().min(count);
        for k in 0..n {
            let i = (2 * k + 1) * documents.len() / (2 * n);
            let tokens = folder.document(side, i)?;
            let source = &folder.manifest().sources[documents[i].source as usize].name;
            let (all, text) = (
                tokens.len(),
                tokenizer.decode(&tokens[..tokens.len().min(60)])?,
            );
            say!("{side:?} document {i} of {source}, {all} tokens: {text:?}");
        }
    }
    Ok(())
}
