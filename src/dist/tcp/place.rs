//! The address at which torchrun's processes connect, from their environment.
//!
//! torchrun's agent uses MASTER_PORT for its store, or leaves that port to PyTorch, and other runs on the host use
//! neighbouring ports. The ranks therefore use the port MASTER_PORT + [`OFFSET`], which none of these uses.

use crate::dist::handshake::Key;
use crate::error::{Error, Result};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::ops::RangeInclusive;

/// Difference between the port of the ranks and MASTER_PORT.
const OFFSET: u16 = 1000;

/// The environment variable that sets another port.
pub const PORT: &str = "ROUTEGRAD_RANKS_PORT";

/// The environment variable with a secret of the run, for a network that other people use too.
const SECRET: &str = "ROUTEGRAD_RANKS_SECRET";

const RUN_ID: &str = "TORCHELASTIC_RUN_ID";

/// The environment variables that make a process one of several.
const NEEDED: [&str; 4] = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];

/// A rank, and the address at which it connects to the others.
pub struct Rendezvous {
    pub rank: usize,
    pub size: usize,
    /// A name or an address of rank 0's host.
    host: String,
    port: u16,
    /// Whether all ranks are on one host, as far as the launcher says.
    one_host: bool,
    pub key: Key,
}

/// Whether torchrun started this process, rather than another program that sets the same variables.
pub fn is_torchrun(read: &dyn Fn(&str) -> Option<String>) -> bool {
    read(RUN_ID).is_some() && size(read).is_some()
}

/// Returns the number of processes, if the environment has all that they need.
pub fn size(read: &dyn Fn(&str) -> Option<String>) -> Option<usize> {
    let complete = read(RUN_ID).is_some() || NEEDED.iter().all(|name| read(name).is_some());
    let size = read("WORLD_SIZE").filter(|_| complete)?;
    // A value that is not a number is refused where it is used.
    Some(size.trim().parse().unwrap_or(0))
}

impl Rendezvous {
    /// Reads the environment.
    ///
    /// # Errors
    /// Returns an error when a variable is missing or has an invalid value.
    pub fn of(read: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let text = |name: &'static str| {
            read(name).ok_or_else(|| {
                let help =
                    "start the ranks with torchrun --no-python, or set all four for each of them";
                Error::invalid("ranks", NEEDED.join(", "), format!("no {name}"), help)
            })
        };
        let whole = |name: &'static str, text: String, allowed: RangeInclusive<u16>| {
            let number = text.trim().parse().ok().filter(|n| allowed.contains(n));
            number.ok_or_else(|| {
                let expected = format!("a number from {} to {}", allowed.start(), allowed.end());
                Error::invalid(name, expected, text, "let the launcher set it")
            })
        };
        let size = whole("WORLD_SIZE", text("WORLD_SIZE")?, 1..=u16::MAX)?;
        let rank = whole("RANK", text("RANK")?, 0..=size - 1)?;
        let theirs = whole("MASTER_PORT", text("MASTER_PORT")?, 0..=u16::MAX)?;
        let port = match read(PORT) {
            Some(port) => whole(PORT, port, 0..=u16::MAX)?,
            None => theirs.checked_add(OFFSET).unwrap_or(theirs - OFFSET),
        };
        let local = read("LOCAL_WORLD_SIZE").and_then(|n| n.trim().parse::<u16>().ok());
        let parts = [RUN_ID, SECRET].map(|name| read(name).unwrap_or_default());
        let material = serde_json::to_vec(&(parts, theirs)).unwrap_or_default();
        Ok(Rendezvous {
            rank: rank.into(),
            size: size.into(),
            host: text("MASTER_ADDR")?,
            port,
            one_host: local.is_none_or(|n| n == size),
            key: blake3::derive_key("routegrad 2026 ranks of torchrun", &material),
        })
    }

    /// Returns the host and the port as text.
    pub fn named(&self) -> String {
        format!("{}, port {}", self.host, self.port)
    }

    /// Returns the addresses of the host and the port.
    ///
    /// # Errors
    /// Returns an error when the name of the host is unknown.
    pub fn addresses(&self) -> Result<Vec<SocketAddr>> {
        let found = (self.host.as_str(), self.port).to_socket_addrs();
        let found = found.map_err(|e| {
            let help = "use a name of rank 0's host that every rank can resolve, or its address";
            Error::invalid(
                "MASTER_ADDR",
                "a host or an address",
                format!("{}: {e}", self.host),
                help,
            )
        })?;
        Ok(found.collect())
    }

    /// On rank 0: listens only at this address.
    ///
    /// # Errors
    /// Returns an error when the address is not of this host, others cannot reach it, or the port is in use.
    pub fn listen(&self) -> Result<TcpListener> {
        let addresses = self.addresses()?;
        let mut last = String::from("no such address");
        for address in addresses {
            if address.ip().is_loopback() && !self.one_host {
                let got = format!("{}, which only this host reaches", address.ip());
                let help = "give torchrun --master-addr or --local-addr an address that the other hosts reach";
                let expected = "an address of rank 0's host";
                return Err(Error::invalid("MASTER_ADDR", expected, got, help));
            }
            match TcpListener::bind(address) {
                Ok(listener) => return Ok(listener),
                Err(e) => last = format!("{address}: {e}"),
            }
        }
        Err(Error::invalid(
            "ranks",
            format!("a free port of rank 0's host, {}", self.named()),
            last,
            format!(
                "end the program that uses it, choose another --master-port, or name a free port for all ranks in {PORT}"
            ),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(set: &[(&str, &str)]) -> Result<Rendezvous> {
        let torchrun = [
            ("RANK", "1"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_WORLD_SIZE", "4"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "29500"),
            (RUN_ID, "a"),
        ];
        let all = set.iter().chain(&torchrun).copied().collect::<Vec<_>>();
        let read = |name: &str| {
            let found = all.iter().find(|(n, _)| *n == name)?.1;
            (!found.is_empty()).then(|| found.to_string())
        };
        Rendezvous::of(&read)
    }

    #[test]
    fn the_port_is_master_port_plus_the_offset_unless_set() {
        let port = |set: &[(&str, &str)]| of(set).unwrap().port;
        assert_eq!(port(&[]), 30500);
        assert_eq!(port(&[("MASTER_PORT", "65000")]), 64000);
        assert_eq!(port(&[(PORT, "1234")]), 1234);
    }

    #[test]
    fn each_run_and_each_secret_has_its_own_key() {
        let key = |set: &[(&str, &str)]| of(set).unwrap().key;
        assert_eq!(key(&[]), key(&[("RANK", "2")]));
        // After a restart torchrun's agents have different restart counts.
        assert_eq!(key(&[]), key(&[("TORCHELASTIC_RESTART_COUNT", "1")]));
        let others = [(RUN_ID, "b"), (SECRET, "x"), ("MASTER_PORT", "29501")];
        let mut keys: Vec<Key> = others.iter().map(|set| key(&[*set])).collect();
        keys.push(key(&[]));
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), others.len() + 1);
    }

    #[test]
    fn missing_and_invalid_variables_are_named() {
        for (set, expected) in [
            (("RANK", "4"), "RANK: expected a number from 0 to 3"),
            (("RANK", ""), "no RANK"),
            (("MASTER_ADDR", ""), "no MASTER_ADDR"),
            (("MASTER_PORT", "x"), "MASTER_PORT"),
            ((PORT, "70000"), PORT),
        ] {
            let error = of(&[set]).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn an_address_that_other_hosts_cannot_reach_is_refused() {
        let meeting = of(&[("LOCAL_WORLD_SIZE", "2")]).unwrap();
        let error = meeting.listen().err().unwrap().to_string();
        assert!(error.contains("only this host reaches"), "{error}");
        let free = of(&[(PORT, "0")]).unwrap().listen().unwrap();
        let address = free.local_addr().unwrap();
        assert!(address.ip().is_loopback());
        let taken = of(&[(PORT, &address.port().to_string())]).unwrap();
        let error = taken.listen().err().unwrap().to_string();
        assert!(error.contains("in use") && error.contains(PORT), "{error}");
    }
}
