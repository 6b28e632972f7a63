//! The program: parses the command line, runs the command, prints an error and sets the exit code.

use clap::Parser;
use routegrad::cli::Cli;
use routegrad::dist;
use std::process::ExitCode;

fn main() -> ExitCode {
    routegrad::report::version::set_commit(git_version::git_version!(
        args = ["--always", "--dirty", "--abbrev=12", "--exclude=*"],
        fallback = ""
    ));
    match dist::conclude(Cli::parse().run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Of several ranks one prints.
            if let Some(error) = error {
                eprintln!("error: {error}");
            }
            ExitCode::FAILURE
        }
    }
}
