//! The launchers of MPI that this machine has, and the processes that they start.

#![allow(dead_code)]

use crate::common::{Place, text};
use std::cell::RefCell;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    OpenMpi,
    Mpich,
    /// A shell that starts processes with torchrun's variables, and ends none.
    Torchrun,
}

impl Launcher {
    fn program(self) -> &'static str {
        match self {
            Launcher::OpenMpi => "mpirun.openmpi",
            Launcher::Mpich => "mpirun.mpich",
            Launcher::Torchrun => "sh",
        }
    }

    /// The variable that tells a process its rank.
    fn rank_variable(self) -> &'static str {
        match self {
            Launcher::OpenMpi => "OMPI_COMM_WORLD_RANK",
            Launcher::Mpich => "PMI_RANK",
            Launcher::Torchrun => "RANK",
        }
    }

    /// `commands`, each on so many ranks, as one run.
    pub fn start(self, commands: &[(usize, &Command)]) -> Command {
        let mut launched = Command::new(self.program());
        launched.stdout(Stdio::piped()).stderr(Stdio::piped());
        if self == Launcher::Torchrun {
            let port = free_port();
            launched.args(["-c", &torchrun(commands)]);
            let size = commands.iter().map(|(ranks, _)| ranks).sum::<usize>();
            launched.envs(variables(size, port));
            return launched;
        }
        if self == Launcher::OpenMpi {
            launched.args(["--allow-run-as-root", "--oversubscribe"]);
            launched.env("TMPDIR", own_folder());
        }
        for (i, (ranks, command)) in commands.iter().enumerate() {
            if i > 0 {
                launched.arg(":");
            }
            launched.args(["-n", &ranks.to_string()]);
            launched.arg(command.get_program()).args(command.get_args());
        }
        launched
    }

    /// `command` on `ranks` ranks of a thread each.
    pub fn ranks(self, ranks: usize, command: &Command) -> Command {
        let mut own = Command::new(command.get_program());
        own.args(["--threads", "1"]).args(command.get_args());
        self.start(&[(ranks, &own)])
    }
}

/// What torchrun gives to all processes of a run of `size` that meet on port `port`.
pub fn variables(size: usize, port: u16) -> [(&'static str, String); 6] {
    [
        ("WORLD_SIZE", size.to_string()),
        ("LOCAL_WORLD_SIZE", size.to_string()),
        ("MASTER_ADDR", "127.0.0.1".into()),
        ("MASTER_PORT", "29500".into()),
        ("TORCHELASTIC_RUN_ID", "test".into()),
        ("ROUTEGRAD_RANKS_PORT", port.to_string()),
    ]
}

/// A new folder for the files of an `mpirun`: of two that share one, the first to end may remove it while the other starts.
fn own_folder() -> PathBuf {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    folder.keep()
}

/// A port that nobody has.
pub fn free_port() -> u16 {
    let free = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    free.local_addr().unwrap().port()
}

/// A shell's program that starts each command on so many ranks, and waits for all.
fn torchrun(commands: &[(usize, &Command)]) -> String {
    let (mut text, mut rank) = (String::from("pids=\n"), 0);
    for (ranks, command) in commands {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words: Vec<_> = words.map(|w| w.to_str().unwrap()).collect();
        let line = shlex::try_join(words).unwrap();
        for _ in 0..*ranks {
            text += &format!("RANK={rank} LOCAL_RANK={rank} {line} & pids=\"$pids $!\"\n");
            rank += 1;
        }
    }
    text + "status=0; for pid in $pids; do wait $pid || status=1; done; exit $status\n"
}

/// What a test holds until its thread ends.
enum Held {
    Alone(#[allow(unused)] RwLockWriteGuard<'static, ()>),
    Beside(#[allow(unused)] RwLockReadGuard<'static, ()>),
}

static TESTS: RwLock<()> = RwLock::new(());

thread_local! {
    static HELD: RefCell<Option<Held>> = const { RefCell::new(None) };
}

/// Lets no other test start processes until this one ends: what processes promise within seconds they can keep only where cores
/// are free.
pub fn wait_for_other_tests() {
    HELD.with_borrow_mut(|held| {
        assert!(!matches!(held, Some(Held::Beside(_))), "it must come first");
        held.get_or_insert_with(|| {
            Held::Alone(TESTS.write().unwrap_or_else(PoisonError::into_inner))
        });
    });
}

/// Lets other tests start processes too, but none that must be alone.
pub fn beside_other_tests() {
    HELD.with_borrow_mut(|held| {
        held.get_or_insert_with(|| {
            Held::Beside(TESTS.read().unwrap_or_else(PoisonError::into_inner))
        });
    });
}

/// Those that are installed; says so where there are none.
pub fn launchers() -> Vec<Launcher> {
    beside_other_tests();
    let found: Vec<Launcher> = [Launcher::OpenMpi, Launcher::Mpich]
        .into_iter()
        .filter(|l| {
            let mut command = Command::new(l.program());
            command
                .arg("--version")
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            command.status().is_ok_and(|s| s.success())
        })
        .collect();
    if found.is_empty() {
        println!("skipped: neither mpirun.openmpi nor mpirun.mpich is installed");
    }
    found
}

/// What every run of these tests has: four sequences in a micro-batch, for four ranks.
pub const SHARED: &[&str] = &[
    "--set",
    "train.micro_batch=4",
    "--set",
    "train.sequences_per_step=8",
    "--set",
    "model.hidden=64",
    "--set",
    "model.vocab_size=512",
];

/// `train` of the micro model in `place`, with batches that ranks can share.
pub fn train(place: &Place, out: &str, arguments: &[&str]) -> Command {
    place.train(out, &[SHARED, arguments].concat())
}

/// The process of rank `rank`, which `variable` tells it, of the run whose command line has `mark`.
pub fn process(variable: &str, mark: &Path, rank: usize) -> Option<u32> {
    let wanted = format!("{variable}={rank}");
    let mark = mark.to_string_lossy();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = processes.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.find(|pid| {
        let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let holds =
            |bytes: &[u8], text: &str| bytes.split(|b| *b == 0).any(|part| part == text.as_bytes());
        let routegrad = fs::read_link(format!("/proc/{pid}/exe"))
            .is_ok_and(|p| p.file_name().is_some_and(|n| n == "routegrad"));
        routegrad && holds(&read("cmdline"), &mark) && holds(&read("environ"), &wanted)
    })
}

/// Waits until `condition` holds, for `most` seconds; how long that took.
pub fn wait_until(most: f64, what: &str, mut condition: impl FnMut() -> bool) -> f64 {
    let begun = Instant::now();
    while !condition() {
        let waited = begun.elapsed().as_secs_f64();
        assert!(waited <= most, "{what}: not within {most} s");
        std::thread::sleep(Duration::from_millis(10));
    }
    begun.elapsed().as_secs_f64()
}

/// A run under a launcher. What is left of it when it is dropped is killed.
pub struct Running {
    pub child: Child,
    launcher: Launcher,
    /// The run's folder, which its command line names.
    out: PathBuf,
    ranks: usize,
}

impl Running {
    pub fn start(launcher: Launcher, mut command: Command, out: &Path, ranks: usize) -> Self {
        Running {
            child: command.spawn().unwrap(),
            launcher,
            out: out.to_path_buf(),
            ranks,
        }
    }

    /// The process of a rank, if it is there.
    pub fn process(&self, rank: usize) -> Option<u32> {
        process(self.launcher.rank_variable(), &self.out, rank)
    }

    fn processes(&self) -> impl Iterator<Item = u32> {
        (0..self.ranks).filter_map(|rank| self.process(rank))
    }

    /// Waits for the launcher and all processes to end, for `most` seconds; whether the launcher says that all went well,
    /// what was said on the standard error, and how long that took.
    pub fn end(mut self, most: f64) -> (bool, String, f64) {
        let stderr = self.child.stderr.take().unwrap();
        // A full pipe would hold the processes up.
        let reading =
            std::thread::spawn(move || std::io::read_to_string(stderr).unwrap_or_default());
        let mut status = None;
        let seconds = wait_until(most, "the end of all processes", || {
            status = status.or(self.child.try_wait().unwrap());
            status.is_some() && self.processes().next().is_none()
        });
        let said = reading.join().unwrap();
        (status.is_some_and(|s| s.success()), said, seconds)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for pid in self.processes() {
            let _ = Command::new("kill")
                .args(["-KILL", &pid.to_string()])
                .status();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([name, &pid.to_string()]).status();
    assert!(status.unwrap().success(), "{name} {pid}");
}

/// Runs to a failure; what it said, without lines of the launcher.
pub fn refused(mut command: Command) -> Vec<String> {
    let output = command.output().unwrap();
    let stderr = text(&output.stderr);
    assert!(!output.status.success(), "{command:?}\n{stderr}");
    errors(&stderr)
}

/// The program's errors in what a run said.
pub fn errors(stderr: &str) -> Vec<String> {
    let lines = stderr.lines().filter(|l| l.starts_with("error: "));
    lines.map(String::from).collect()
}
