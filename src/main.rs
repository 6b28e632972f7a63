//! The program: parses the command line, runs the command, prints an error and sets the exit code.

use clap::Parser;
use routegrad::cli::Cli;
use std::process::ExitCode;

fn main() -> ExitCode {
    routegrad::report::version::set_commit(git_version::git_version!(
        args = ["--always", "--dirty", "--abbrev=12", "--exclude=*"],
        fallback = ""
    ));
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
