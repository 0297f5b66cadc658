//! The data path without an agent: tables that a test builds, published as fast as possible.

use std::{
    collections::BTreeSet,
    future::{Future as _, poll_fn},
    net::SocketAddr,
    pin::pin,
    task::Poll,
};

use anyhow::{Context as _, Result, bail};
use portolan_core::{
    model::Protocol,
    policy::{Schedule, Share, WeightedGroup},
    table::{Completeness, FrontendSpec, GraceEpoch, Layout, Op, Rejected, Sizes, Table, key},
};
use portolan_datapath::{Datapath, Options, ProgramLog};
use tokio::runtime::Runtime;

use crate::{TestBed, binary};

/// Programs attached to a node's pods, and the tables that they read.
pub struct Direct {
    datapath: Datapath,
    layout: Layout,
    /// The last grace epoch that has not elapsed; `None` if all have.
    open: Option<GraceEpoch>,
    runtime: Runtime,
}

impl Direct {
    /// Attaches the programs to a node's pods, with empty tables.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects a map, a program, or an attachment.
    pub fn new(bed: &TestBed, sizes: Sizes) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let options = Options {
            cgroup: Some(bed.cgroup.path().to_owned()),
            bpffs: bed.pins().clone(),
            sizes,
            log: ProgramLog::Off,
            program: binary("portolan")?,
        };
        let inside = runtime.enter();
        let (mut datapath, held) = Datapath::open(&options)?;
        drop(inside);
        datapath.attach()?;
        Ok(Self { datapath, layout: Layout::adopt(sizes, held), open: None, runtime })
    }

    /// Returns the data path itself.
    pub fn kernel(&mut self) -> &mut Datapath {
        &mut self.datapath
    }

    /// Publishes a table in place of the last one, and reclaims entries that no program can still be reading.
    ///
    /// # Errors
    /// Returns an error if the table does not fit, or if the kernel rejects a write.
    pub fn publish(&mut self, table: &Table) -> Result<()> {
        let written = self.layout.update(table, Completeness::Complete);
        self.write(written)
    }

    /// Publishes these frontends, and leaves all others unchanged.
    ///
    /// # Errors
    /// Returns an error if the frontends do not fit, or if the kernel rejects a write.
    pub fn change(&mut self, table: &Table) -> Result<()> {
        let written = self.layout.change(table, &[], Completeness::Complete);
        self.write(written)
    }

    fn write(&mut self, (ops, refused): (Vec<Op>, Vec<Rejected>)) -> Result<()> {
        self.datapath.maps.apply(&ops)?;
        if let Some(epoch) = self.layout.end_epoch() {
            self.datapath.grace.begin(epoch);
            self.open = Some(epoch);
        }
        // Reclaim the epochs that have elapsed by now.
        while let Poll::Ready(epoch) = self.poll_settled() {
            self.elapsed(epoch);
        }
        match refused.first() {
            None => Ok(()),
            Some(first) => bail!("{} frontends do not fit; the first: {first:?}", refused.len()),
        }
    }

    /// Waits until freed entries can be reused, and moves short lists there. Returns at once if none are pending.
    ///
    /// # Errors
    /// Returns an error if no grace epoch elapses within 10 seconds, or if the kernel rejects a write.
    pub fn reclaim(&mut self) -> Result<()> {
        while self.open.is_some() {
            let elapsed =
                async { tokio::time::timeout(std::time::Duration::from_secs(10), self.datapath.grace.elapsed()).await };
            let epoch = self.runtime.block_on(elapsed).context("no grace epoch elapsed within 10 s")?;
            self.elapsed(epoch);
            let moves = self.layout.move_inline();
            self.write((moves, Vec::new()))?;
        }
        Ok(())
    }

    fn poll_settled(&mut self) -> Poll<GraceEpoch> {
        let mut elapsed = pin!(self.datapath.grace.elapsed());
        self.runtime.block_on(poll_fn(|context| Poll::Ready(elapsed.as_mut().poll(context))))
    }

    fn elapsed(&mut self, epoch: GraceEpoch) {
        self.layout.reclaim(epoch);
        self.open.take_if(|open| *open <= epoch);
    }

    /// Opts out exactly these cgroups, by ID.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects a write.
    pub fn opt_out(&mut self, cgroups: &BTreeSet<u64>) -> Result<()> {
        Ok(self.datapath.opted_out.as_mut().context("the opt-out map has another owner")?.set(cgroups)?)
    }

    /// Returns the number of entries in use, by map.
    pub fn occupancy(&self) -> Vec<(&'static str, u32)> {
        self.layout.occupancy().map(|(name, used, _)| (name, used)).into()
    }

    /// Returns the number of connections whose lookup found the table inconsistent.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects a read of the counters.
    pub fn inconsistent(&self) -> Result<u64> {
        Ok(self.datapath.maps.counters()?.inconsistent)
    }

    /// Returns the number of sockets so far whose state went to socket storage.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects a read of the counters.
    pub fn fallback(&self) -> Result<u64> {
        Ok(self.datapath.maps.counters()?.fallback)
    }
}

/// Builds a table of TCP frontends, each of which uses its endpoints in turn, with equal weights.
pub fn table(frontends: impl IntoIterator<Item = (SocketAddr, Vec<SocketAddr>)>) -> Table {
    let entry = |endpoints: Vec<SocketAddr>| FrontendSpec {
        schedule: std::sync::Arc::new(if endpoints.is_empty() {
            Schedule::default()
        } else {
            let members = endpoints.iter().map(|endpoint| (*endpoint, 1)).collect();
            Schedule::new(vec![WeightedGroup::in_turn(Share::from(1), members)])
        }),
        endpoints: endpoints.into(),
        pools: std::sync::Arc::new([]),
        affinity: None,
        random: false,
    };
    let frontends = frontends.into_iter().map(|(address, endpoints)| (key(address, Protocol::Tcp), entry(endpoints)));
    Table { frontends: frontends.collect() }
}
