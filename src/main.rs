//! The `routegrad` program; see [`routegrad::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    routegrad::report::version::set_commit(git_version::git_version!(
        args = ["--always", "--dirty", "--abbrev=12", "--exclude=*"],
        fallback = ""
    ));
    routegrad::cli::main()
}
