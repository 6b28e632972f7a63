//! Files that were damaged at random: bits turned, bytes replaced or put in, ends cut off or added. A checkpoint, whose
//! files have checksums, gives an error each time; files of others give an error or are read, and never a panic, a hang
//! or more memory than there is.
//!
//! `ROUTEGRAD_DAMAGE_CASES` says how many, `ROUTEGRAD_DAMAGE_SEED` which.

use crate::common::{Place, succeed};
use routegrad::config::{Config, Layers};
use routegrad::error::Result;
use routegrad::report::events::{EVENTS_FILE, Events};
use routegrad::report::metrics::Log;
use routegrad::routers;
use routegrad::study::exchange::Source;
use routegrad::study::tasks;
use routegrad::tensor::random::{Purpose, Stream};
use routegrad::train::checkpoint;
use routegrad::train::step::StepExecutor;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

/// Time for one case, a hundred times what the slowest takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Something that reads files.
struct Reader {
    name: &'static str,
    /// Copied, then one of them damaged.
    folder: PathBuf,
    files: Vec<&'static str>,
    read: fn(&Path) -> Result<()>,
    /// Whether every damage must be noticed.
    checked: bool,
}

fn number(variable: &str, default: u64) -> u64 {
    let Ok(text) = std::env::var(variable) else {
        return default;
    };
    text.parse()
        .unwrap_or_else(|_| panic!("{variable} is a number, not `{text}`"))
}

/// Random whole numbers.
struct Draws {
    stream: Stream,
    next: u64,
}

impl Draws {
    fn below(&mut self, n: usize) -> usize {
        self.next += 1;
        let [low, high, ..] = self.stream.bits(self.next);
        ((u64::from(high) << 32 | u64::from(low)) % n as u64) as usize
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.below(256) as u8).collect()
    }
}

/// Other bytes than `whole`, and what was done to them.
fn damaged(whole: &[u8], draws: &mut Draws) -> (Vec<u8>, String) {
    loop {
        let mut bytes = whole.to_vec();
        let n = bytes.len();
        let many = 1 + draws.below(8);
        // Half of the damage near the beginning, where the headers are.
        let place = |draws: &mut Draws| match draws.below(2) {
            0 => draws.below(n),
            _ => draws.below(n.min(256)),
        };
        let what = match draws.below(5) {
            0 => {
                (0..many).for_each(|_| bytes[place(draws)] ^= 1 << draws.below(8));
                format!("{many} bits turned")
            }
            1 => {
                (0..many).for_each(|_| bytes[place(draws)] = draws.below(256) as u8);
                format!("{many} bytes replaced")
            }
            2 => {
                // Where numbers stand as text, digits make them larger.
                let at = place(draws);
                let digits = draws.bytes(many).into_iter().map(|b| b'0' + b % 10);
                bytes.splice(at..at, digits);
                format!("{many} digits put in at {at}")
            }
            3 => {
                bytes.truncate(draws.below(n));
                format!("cut off after {} of {n} bytes", bytes.len())
            }
            _ => {
                bytes.extend(draws.bytes(many * 8));
                format!("{} bytes added", many * 8)
            }
        };
        if bytes != whole {
            return (bytes, what);
        }
    }
}

fn read_checkpoint(folder: &Path) -> Result<()> {
    let (found, _) = checkpoint::find(folder)?;
    let (model, state) = checkpoint::load_model(&found)?;
    let mut trainer = StepExecutor::new(&state.config.train, &model);
    checkpoint::load_trainer(&found, &state, &model, &mut trainer)
}

fn read_foreign(folder: &Path) -> Result<()> {
    let source = Source::open(folder)?;
    let config = source.config(&Layers::preset("tiny"))?;
    source.model(&config).map(|_| ())
}

fn read_config(folder: &Path) -> Result<()> {
    let mut layers = Layers::preset("tiny");
    layers.file = Some(folder.join("config.toml"));
    Config::load(&layers, &routers::resolve).map(|_| ())
}

fn read_documents(folder: &Path) -> Result<()> {
    tasks::read(&[tasks::find("piqa")?], folder, 0).map(|_| ())
}

fn read_logs(folder: &Path) -> Result<()> {
    Log::open(&folder.join("metrics.jsonl"), 1)?;
    Events::open(&folder.join(EVENTS_FILE), 1).map(|_| ())
}

/// The checkpoint of a run again, in files of up to 100 kB.
fn shard(run: &Path, to: &Path) -> PathBuf {
    let (found, _) = checkpoint::find(run).unwrap();
    let (model, state) = checkpoint::load_model(&found).unwrap();
    let mut trainer = StepExecutor::new(&state.config.train, &model);
    checkpoint::load_trainer(&found, &state, &model, &mut trainer).unwrap();
    let snapshot = checkpoint::snapshot(&model, &trainer, &state).unwrap();
    checkpoint::save(to, &snapshot, 1, 100_000).unwrap()
}

fn readers(place: &Place) -> Vec<Reader> {
    succeed(&mut place.train("run", &["--steps", "3"]));
    let run = place.path("run");
    let sharded = shard(&run, &place.path("sharded"));
    let documents = place.path("documents");
    fs::create_dir(&documents).unwrap();
    let lines: Vec<String> = (0..40)
        .map(|i| format!(r#"{{"doc_id": {i}, "doc": {{"goal": "g{i}", "choices": ["a{i}", "b"], "gold": {}}}}}"#, i % 2))
        .collect();
    let packed = compress_to_vec(lines.join("\n").as_bytes(), CompressionLevel::Fastest);
    fs::write(documents.join("piqa.jsonl.zst"), packed).unwrap();
    let foreign = |name: &str| Path::new("tests/fixtures/transformers").join(name);
    vec![
        Reader {
            name: "checkpoint",
            folder: run.join("checkpoints/step-3"),
            files: vec![
                "config.json",
                "model.safetensors",
                "trainer.safetensors",
                "trainer.json",
                "manifest.json",
            ],
            read: read_checkpoint,
            checked: true,
        },
        Reader {
            name: "checkpoint in several files",
            folder: sharded,
            files: vec![
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "trainer-00002-of-00003.safetensors",
                "trainer.safetensors.index.json",
                "manifest.json",
            ],
            read: read_checkpoint,
            checked: true,
        },
        Reader {
            name: "qwen2_moe",
            folder: foreign("qwen2_moe"),
            files: vec!["config.json", "model.safetensors"],
            read: read_foreign,
            checked: false,
        },
        Reader {
            name: "olmoe",
            folder: foreign("olmoe"),
            files: vec![
                "config.json",
                "model.safetensors.index.json",
                "model-00001-of-00004.safetensors",
            ],
            read: read_foreign,
            checked: false,
        },
        Reader {
            name: "configuration",
            folder: run.clone(),
            files: vec!["config.toml"],
            read: read_config,
            checked: false,
        },
        Reader {
            name: "documents",
            folder: documents,
            files: vec!["piqa.jsonl.zst"],
            read: read_documents,
            checked: false,
        },
        Reader {
            name: "logs",
            folder: run,
            files: vec!["metrics.jsonl", EVENTS_FILE],
            read: read_logs,
            checked: false,
        },
    ]
}

/// A copy of the files, one of which is about to be damaged.
fn copy(reader: &Reader, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(&reader.folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

#[test]
fn damaged_files_are_refused_or_read_and_do_no_harm() {
    let place = Place::new();
    let readers = readers(&place);
    fs::create_dir(place.path("damaged")).unwrap();
    let copies = readers.iter().map(|r| place.path("damaged").join(r.name));
    let copies: Vec<PathBuf> = copies.collect();
    for (reader, copied) in readers.iter().zip(&copies) {
        copy(reader, copied);
        (reader.read)(copied).unwrap_or_else(|e| panic!("{} before any damage: {e}", reader.name));
    }
    let cases = number("ROUTEGRAD_DAMAGE_CASES", 600);
    let seed = number("ROUTEGRAD_DAMAGE_SEED", 0);
    let current = Mutex::new(String::new());
    let (done, finished) = mpsc::channel();
    // By reader: refused, read.
    let mut counts: BTreeMap<&str, [u64; 2]> = BTreeMap::new();
    std::thread::scope(|scope| {
        let (readers, copies, current) = (&readers, &copies, &current);
        scope.spawn(move || {
            for case in 0..cases {
                let which = case as usize % readers.len();
                let reader = &readers[which];
                let mut draws = Draws {
                    stream: Stream::new(seed, Purpose::Check, case, which),
                    next: 0,
                };
                let file = reader.files[draws.below(reader.files.len())];
                let whole = fs::read(reader.folder.join(file)).unwrap();
                let (bytes, what) = damaged(&whole, &mut draws);
                let told = format!("case {case} of seed {seed}: {} {file}, {what}", reader.name);
                current.lock().unwrap().clone_from(&told);
                let path = copies[which].join(file);
                fs::write(&path, bytes).unwrap();
                let read = catch_unwind(AssertUnwindSafe(|| (reader.read)(&copies[which])));
                fs::write(&path, whole).unwrap();
                if done
                    .send((reader, told, read.map(|r| r.is_ok()).ok()))
                    .is_err()
                {
                    return;
                }
            }
        });
        loop {
            match finished.recv_timeout(PATIENCE) {
                Ok((_, told, None)) => panic!("a panic: {told}"),
                Ok((reader, told, Some(read))) => {
                    assert!(!(read && reader.checked), "not noticed: {told}");
                    counts.entry(reader.name).or_default()[usize::from(read)] += 1;
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                // The thread cannot be stopped.
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    eprintln!("no end in {PATIENCE:?}: {}", current.lock().unwrap());
                    std::process::abort();
                }
            }
        }
    });
    for (name, [refused, read]) in &counts {
        println!("{name}: {refused} refused, {read} read");
    }
    assert_eq!(counts.values().flatten().sum::<u64>(), cases);
}
