//! The command line: `arguments` declares the arguments of each command, `commands` runs the commands.

mod arguments;
mod commands;
mod data;
mod generate;
mod process;
mod proofs;
mod ranks;
mod saved;
mod settings;
mod timings;
mod train;
mod values;

pub use arguments::Cli;

use crate::device::Device;
use crate::dist;
use crate::error::{Error, Result};
use crate::report::{STDOUT, in_plain_words, stderr_line};
use arguments::Command;
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};
use commands::*;
use process::{refuse_launcher, set_threads, simulate};
use std::process::{ExitCode, exit};
use train::train_command;

/// Runs the program: parses the command line, runs the command, prints its error if it fails, and returns the exit
/// code.
///
/// A program with its own routers registers them and then calls this function. Every command then supports them:
///
/// ```no_run
/// use routegrad::routers::{self, RouterInfo};
/// # type Hashed = routegrad::routers::topk::TopK;
///
/// fn main() -> std::process::ExitCode {
///     let info = RouterInfo::new::<Hashed>("hashed", "experts picked by a hash");
///     if let Err(error) = routers::register(info) {
///         eprintln!("error: {error}");
///         return std::process::ExitCode::FAILURE;
///     }
///     routegrad::cli::main()
/// }
/// ```
pub fn main() -> ExitCode {
    match dist::conclude(Cli::of_process().run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Some(error)) if reader_left(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.as_ref().map_or(1, Error::exit_code);
            // Of several ranks only one prints the error.
            if let Some(error) = error {
                stderr_line(&format!("error: {error}"));
            }
            ExitCode::from(code)
        }
    }
}

/// Whether the reader of the output has ended, as `head` does in `| head`.
fn reader_left(error: &Error) -> bool {
    let Error::Io { path, source, .. } = error else {
        return false;
    };
    path.as_os_str() == STDOUT && source.kind() == std::io::ErrorKind::BrokenPipe
}

/// Allows negative numbers as values of all options, so that an error names the number instead of an unknown option.
fn with_negative_numbers(command: clap::Command) -> clap::Command {
    let command = command.mut_args(|argument| match argument.get_action().takes_values() {
        true => argument.allow_negative_numbers(true),
        false => argument,
    });
    command.mut_subcommands(with_negative_numbers)
}

impl Cli {
    /// Parses the command line of this process. Exits if there is nothing to run, as after an error or `--help`.
    fn of_process() -> Self {
        let matches = with_negative_numbers(Self::command()).try_get_matches();
        let parsed = matches.and_then(|matches| Self::from_arg_matches(&matches));
        parsed.unwrap_or_else(|e| {
            if e.kind() != ErrorKind::ValueValidation {
                e.exit();
            }
            stderr_line(in_plain_words(&e.to_string()).trim_end());
            exit(e.exit_code())
        })
    }

    /// Runs the command.
    ///
    /// # Errors
    /// Returns the error of the command, which has not been printed yet.
    pub fn run(self) -> Result<()> {
        use Command::{Ablate, Analyze, Eval, Train};
        if let Some(threads) = self.threads {
            set_threads(threads)?;
        }
        let command = &self.command;
        if !matches!(command, Train(_) | Ablate { .. } | Eval(_) | Analyze(_)) {
            refuse_launcher()?;
        }
        match self.command {
            Command::Train(args) => train_command(&args, self.threads),
            Command::Data(command) => data::run(command),
            Command::Eval(args) => eval_command(&args, self.threads),
            Command::Analyze(args) => analyze_command(&args, self.threads),
            Command::Ablate { ablate, ranks } => ablate_command(&ablate, &ranks, self.threads),
            Command::Generate(args) => generate::generate_command(&args),
            Command::Export(args) => export_command(&args),
            Command::Gradcheck {
                filter,
                plant,
                device,
                sim_arch,
            } => match device {
                arguments::CheckedDevice::Cpu => {
                    simulate(sim_arch, Device::Cpu)?;
                    gradcheck_command(&filter, plant)
                }
                arguments::CheckedDevice::Sim => {
                    simulate(sim_arch, Device::Sim)?;
                    gradcheck_on_simulator(&filter, plant)
                }
            },
            Command::Ops {
                preset,
                router,
                set,
            } => list_ops(&preset, &router, set),
            Command::Config(args) => settings::config_command(&args),
            Command::Routers => list_routers(),
            Command::Dump(args) => dump_command(&args),
            Command::Import(args) => import_command(&args),
            Command::Plan(args) => plan_command(&args),
            Command::Floors {
                preset,
                tokens,
                device,
            } => print_floors(&preset, tokens, device),
            Command::HardwareCheck(args) => proofs::check(args),
            Command::Status(args) => proofs::status(&args),
            Command::Bench(args) => timings::run(args),
        }
    }
}
