//! The data path without an agent: tables as a test makes them, published as fast as it can.

use std::{
    collections::BTreeSet,
    future::{Future as _, poll_fn},
    net::SocketAddr,
    pin::pin,
    task::Poll,
};

use anyhow::{Context as _, Result, ensure};
use portolan_core::{
    model::Protocol,
    policy::{Schedule, Share, WeightedGroup},
    table::{Completeness, FrontendSpec, GraceEpoch, Layout, Op, Rejected, Sizes, Table, key},
};
use portolan_datapath::{Datapath, Options, ProgramLog};
use tokio::runtime::Runtime;

use crate::{Bed, binary};

/// Programs on a node's pods, and what they are told.
pub struct Direct {
    datapath: Datapath,
    layout: Layout,
    /// The last round that has not settled.
    open: Option<GraceEpoch>,
    runtime: Runtime,
}

impl Direct {
    /// Attaches the programs to the pods of a node, with empty tables.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(bed: &Bed, sizes: Sizes) -> Result<Self> {
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
        Ok(Self { datapath, layout: Layout::from_held(sizes, held), open: None, runtime })
    }

    /// Publishes a table in the place of the last one, and gives back what nobody reads any more.
    ///
    /// # Errors
    /// It does not fit, or what the kernel says.
    pub fn publish(&mut self, table: &Table) -> Result<()> {
        let written = self.layout.update(table, Completeness::Complete);
        self.write(written)
    }

    /// Publishes these frontends; all others stay as they are.
    ///
    /// # Errors
    /// They do not fit, or what the kernel says.
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
        // Those that have settled by now.
        while let Poll::Ready(epoch) = self.poll_settled() {
            self.elapsed(epoch);
        }
        ensure!(refused.is_empty(), "{refused:?} do not fit");
        Ok(())
    }

    /// Waits until some of what was freed may be used again, if there is anything to wait for.
    ///
    /// # Errors
    /// It takes too long.
    pub fn reclaim(&mut self) -> Result<()> {
        if self.open.is_none() {
            return Ok(());
        }
        let elapsed =
            async { tokio::time::timeout(std::time::Duration::from_secs(10), self.datapath.grace.elapsed()).await };
        let epoch = self.runtime.block_on(elapsed).context("nothing settles")?;
        self.elapsed(epoch);
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

    /// Leaves these cgroups alone, by their ids, and no others.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn leave_alone(&mut self, cgroups: &BTreeSet<u64>) -> Result<()> {
        self.datapath.opted_out.as_mut().context("somebody else keeps them")?.set(cgroups)
    }

    /// Entries in use, by map.
    pub fn occupancy(&self) -> Vec<(&'static str, u32)> {
        self.layout.occupancy().map(|(name, used, _)| (name, used)).into()
    }

    /// Connections that found the table in contradiction to itself.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn inconsistent(&self) -> Result<u64> {
        Ok(self.datapath.maps.counters()?.inconsistent)
    }
}

/// A table of TCP frontends, each with endpoints that take turns.
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
