//! Runs tasks in processes of their own.

use super::kind::Kind;
use super::outcome::Outcome;
use super::place::Place;
use super::program::{last_lines, start, this_program};
use super::record::Ending;
use super::task::Task;
use crate::error::Result;
use serde_json::json;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Exit code that compute-sanitizer is told to use if it found errors.
const FOUND: i32 = 86;

/// Runs a task in its own process, which is killed after `limit` seconds.
///
/// # Errors
/// When this program cannot be started as a child process.
pub fn in_child(task: &Task, place: &Place, limit: f64) -> Result<Outcome> {
    let mut command = this_program()?;
    // The sanitizers run the same check that otherwise compares results.
    let sanitized = matches!(task.kind, Kind::Memcheck | Kind::Racecheck);
    if sanitized {
        let Some(path) = sanitizer() else {
            let why = "compute-sanitizer is not installed";
            return Ok(Outcome::new(Ending::Unavailable, why));
        };
        let program = command;
        command = Command::new(path);
        command
            .args(["--tool", task.kind.verb()])
            .args(["--error-exitcode", &FOUND.to_string()])
            .arg(program.get_program());
    }
    command
        .args(["hardware-check", "--one", &task.name()])
        .args(["--device", &place.device.to_string()])
        .args(place.planted.then_some("--plant"))
        .arg("--out")
        .arg(&place.out)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = start(&mut command)?;
    let text = both_streams(&mut child);
    let Some(status) = wait(&mut child, limit) else {
        let why = format!("killed after {limit:.0} s");
        return Ok(Outcome::new(Ending::TimedOut, why));
    };
    let text = text();
    if sanitized {
        return Ok(of_sanitizer(&text, status.code()));
    }
    Ok(last_outcome(&text).unwrap_or_else(|| {
        let why = format!("the process ended with {status}: {}", last_lines(&text, 5));
        Outcome::new(Ending::Failed, why)
    }))
}

/// Time for which the pipes are still read after the process has ended; a process that it left running may hold them open
/// forever.
const AFTERWARDS: Duration = Duration::from_secs(5);

/// Reads standard output and standard error on separate threads, so that neither pipe becomes full. The returned function
/// waits for both, but not forever, and returns their text; the line with the outcome is the last.
fn both_streams(child: &mut Child) -> impl FnOnce() -> String + use<> {
    let error = child.stderr.take().map(|s| pieces(Box::new(s)));
    let output = child.stdout.take().map(|s| pieces(Box::new(s)));
    move || {
        let end = Instant::now() + AFTERWARDS;
        let text = |pieces: Option<Receiver<Vec<u8>>>| {
            let pieces = pieces.into_iter().flat_map(|pieces| {
                let left = move || end.saturating_duration_since(Instant::now());
                std::iter::from_fn(move || pieces.recv_timeout(left()).ok())
            });
            String::from_utf8_lossy(&pieces.flatten().collect::<Vec<u8>>()).into_owned()
        };
        format!("{}\n{}", text(error), text(output))
    }
}

/// Reads `stream` to its end on a thread, which sends the data in pieces.
fn pieces(mut stream: Box<dyn Read + Send>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Waits for the process; returns its exit status, or `None` if it had to be killed.
fn wait(child: &mut Child, limit: f64) -> Option<std::process::ExitStatus> {
    if let Some(status) = ended_within(child, limit) {
        return Some(status);
    }
    // Kills the complete process group: a child of the sanitizer would otherwise continue and keep the GPU.
    let group = format!("-{}", child.id());
    let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
    // A process that the driver blocks may take long to end; the other tasks must not wait long for it.
    ended_within(child, 10.0);
    None
}

fn ended_within(child: &mut Child, seconds: f64) -> Option<std::process::ExitStatus> {
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < seconds {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}

/// Parses the outcome that a task's process printed last.
fn last_outcome(text: &str) -> Option<Outcome> {
    text.lines()
        .rev()
        .find_map(|line| serde_json::from_str(line).ok())
}

/// Interprets the output of compute-sanitizer.
fn of_sanitizer(text: &str, code: Option<i32>) -> Outcome {
    let summary = text
        .lines()
        .rev()
        .find(|line| line.contains("SUMMARY:"))
        .map(|line| line.trim_matches(['=', ' ']));
    let first: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("========="))
        .take(12)
        .collect();
    let outcome = last_outcome(text);
    let ran = outcome.as_ref().is_some_and(|o| o.ending == Ending::Passed);
    match summary {
        Some(summary) if ran && code == Some(0) => Outcome::new(Ending::Passed, summary),
        Some(summary) if code == Some(FOUND) && ran => Outcome {
            measured: json!({ "report": first }),
            ..Outcome::new(Ending::Failed, summary)
        },
        // The program ran and reports itself what was wrong.
        Some(_) if let Some(outcome) = outcome => outcome,
        _ => {
            let why = "compute-sanitizer did not run the program";
            Outcome {
                measured: json!({ "report": first }),
                ..Outcome::new(Ending::Unavailable, why)
            }
        }
    }
}

fn sanitizer() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin")));
    folders.push("/usr/local/cuda/bin".into());
    folders
        .into_iter()
        .map(|folder| folder.join("compute-sanitizer"))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", script]).process_group(0);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    #[test]
    fn a_process_that_hangs_is_killed_with_its_children() {
        let mut child = shell("sleep 60; true");
        let text = both_streams(&mut child);
        let start = Instant::now();
        assert!(wait(&mut child, 0.2).is_none());
        text(); // returns when the last process that holds the pipes has ended
        assert!(start.elapsed().as_secs() < 8);
    }

    #[test]
    fn much_output_does_not_block_a_process_and_the_last_line_is_kept() {
        let mut child = shell("head -c 1000000 /dev/zero | tr '\\0' x >&2; echo end");
        let text = both_streams(&mut child);
        assert!(wait(&mut child, 60.0).is_some_and(|status| status.success()));
        assert!(text().ends_with("end\n"));
    }

    #[test]
    fn a_process_left_running_does_not_delay_the_end() {
        let mut child = shell("sleep 60 & echo end");
        let (text, start) = (both_streams(&mut child), Instant::now());
        assert!(wait(&mut child, 60.0).is_some_and(|status| status.success()));
        assert!(text().ends_with("end\n"));
        assert!(start.elapsed() < 3 * AFTERWARDS);
        let group = format!("-{}", child.id());
        let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
    }

    #[test]
    fn the_output_of_the_sanitizer_is_interpreted_correctly() {
        let line = serde_json::to_string(&Outcome::new(Ending::Passed, "")).unwrap();
        let clean =
            format!("========= COMPUTE-SANITIZER\n{line}\n========= ERROR SUMMARY: 0 errors\n");
        assert_eq!(of_sanitizer(&clean, Some(0)).ending, Ending::Passed);
        let found = clean.replace("0 errors", "2 errors");
        assert_eq!(of_sanitizer(&found, Some(FOUND)).ending, Ending::Failed);
        assert_eq!(
            of_sanitizer(&found, Some(FOUND)).detail,
            "ERROR SUMMARY: 2 errors"
        );
        let refused = "========= COMPUTE-SANITIZER\n========= Error: Device not supported\n";
        assert_eq!(of_sanitizer(refused, Some(1)).ending, Ending::Unavailable);
    }
}
