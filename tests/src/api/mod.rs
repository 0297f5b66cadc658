//! A stand-in for an API server: HTTPS, tokens, lists in pages, watches with bookmarks, and the ways in which the real one goes wrong.
//!
//! It answers what an agent asks, list and watch, as the documentation of Kubernetes describes them. It stores what it is given and validates
//! nothing.

mod request;
mod serve;
mod state;

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use self::{serve::Serving, state::State};
use crate::{Directory, Namespace, netns::enter};

/// The stand-in. It is gone with the value.
pub struct Api {
    shared: Arc<Shared>,
    runtime: Option<tokio::runtime::Runtime>,
    serving: Option<Serving>,
    listeners: Vec<(File, SocketAddr)>,
    acceptor: TlsAcceptor,
    certificate: String,
    files: Directory,
    number: u32,
}

/// What requests see.
struct Shared {
    state: Mutex<State>,
    /// The version of the last change.
    changed: watch::Sender<u64>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let result = work(&mut state);
        self.changed.send_replace(state.version);
        result
    }
}

const TOKEN: &str = "the-first-token";

impl Api {
    /// A new one, with nothing in it, that nobody can reach yet.
    ///
    /// # Errors
    /// There is no room for it.
    pub fn new() -> Result<Self> {
        let authority_key = KeyPair::generate()?;
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_certificate = authority.self_signed(&authority_key)?;
        let key = KeyPair::generate()?;
        let names =
            ["127.0.0.1".to_owned(), "::1".to_owned(), "kubernetes.default.svc".to_owned(), "172.16.255.1".to_owned()];
        let certificate = CertificateParams::new(names)?.signed_by(&key, &Issuer::new(authority, authority_key))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            )?;
        let shared = Shared { state: Mutex::new(State::new(TOKEN)), changed: watch::Sender::new(1) };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Self {
            shared: Arc::new(shared),
            runtime: Some(runtime),
            serving: None,
            listeners: Vec::new(),
            acceptor: TlsAcceptor::from(Arc::new(config)),
            certificate: authority_certificate.pem(),
            files: Directory::new()?,
            number: 0,
        })
    }

    /// Listens in a namespace, on its loopback address; how to reach it there, in a file for `--kubeconfig`. The token is in a file of its own.
    ///
    /// # Errors
    /// It cannot listen there.
    pub fn reach(&mut self, namespace: &Namespace) -> Result<PathBuf> {
        let address = self.listen(namespace, "127.0.0.1:0".parse()?)?;
        let token = self.files.scratch("token");
        if !token.exists() {
            fs::write(&token, TOKEN)?;
        }
        self.number += 1;
        let path = self.files.scratch(&format!("kubeconfig-{}", self.number));
        fs::write(&path, self.kubeconfig(address, &json!({"tokenFile": token})).to_string())?;
        Ok(path)
    }

    /// The folder with the account that a pod has: a token, and who has signed the server's certificate.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn account(&self) -> Result<PathBuf> {
        let account = self.files.scratch("account");
        fs::create_dir_all(&account)?;
        for (file, text) in [("token", TOKEN), ("ca.crt", &self.certificate), ("namespace", "portolan-system")] {
            fs::write(account.join(file), text)?;
        }
        Ok(account)
    }

    /// The Secret by which another cluster's agents follow this one, under an id, from a namespace.
    ///
    /// # Errors
    /// It cannot listen there.
    pub fn secret(&mut self, namespace: &Namespace, id: &str) -> Result<Value> {
        let address = self.listen(namespace, "127.0.0.1:0".parse()?)?;
        let kubeconfig = self.kubeconfig(address, &json!({"token": TOKEN}));
        Ok(secret(&format!("istio-remote-secret-{id}"), &[(id, &kubeconfig.to_string())]))
    }

    /// Listens at an address in a namespace.
    ///
    /// # Errors
    /// It cannot.
    pub fn listen(&mut self, namespace: &Namespace, address: SocketAddr) -> Result<SocketAddr> {
        let listener = namespace.enter(|| Ok(TcpListener::bind(address)?))?;
        let address = listener.local_addr()?;
        self.listeners.push((namespace.open()?, address));
        self.serve(vec![listener])?;
        Ok(address)
    }

    /// A kubeconfig for this server at an address.
    pub fn kubeconfig(&self, address: SocketAddr, user: &Value) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": {
                "server": format!("https://{address}"), "certificate-authority-data": base64(self.certificate.as_bytes())}}],
            "users": [{"name": "it", "user": user}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        })
    }

    /// The certificate of the authority that has signed the server's.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    fn serve(&mut self, listeners: Vec<TcpListener>) -> Result<()> {
        let runtime = self.runtime.as_ref().context("it has ended")?;
        let serving = self.serving.get_or_insert_default();
        for listener in listeners {
            listener.set_nonblocking(true)?;
            let _inside = runtime.enter();
            let listener = tokio::net::TcpListener::from_std(listener)?;
            serving.begin(listener, self.acceptor.clone(), Arc::clone(&self.shared));
        }
        Ok(())
    }

    /// Goes away: connections break, new ones are refused.
    pub fn stop(&mut self) {
        if let (Some(runtime), Some(serving)) = (&self.runtime, self.serving.take()) {
            runtime.block_on(serving.end());
        }
    }

    /// Is back, with all that it held.
    ///
    /// # Errors
    /// Its addresses are taken.
    pub fn start(&mut self) -> Result<()> {
        let bind = |(namespace, address): &(File, SocketAddr)| enter(namespace, || Ok(TcpListener::bind(*address)?));
        let listeners: Vec<TcpListener> = self.listeners.iter().map(bind).collect::<Result<_>>()?;
        self.serve(listeners)
    }

    /// Takes objects, or changed ones.
    pub fn apply(&self, objects: &[Value]) {
        self.shared.change(|state| objects.iter().for_each(|object| state.apply(object)));
    }

    /// Takes objects, or changed ones, and tells no watch of them.
    pub fn apply_unseen(&self, objects: &[Value]) {
        self.shared.change(|state| {
            let told = state.history.len();
            objects.iter().for_each(|object| state.apply(object));
            state.history.truncate(told);
        });
    }

    /// Holds these objects, and no others but Secrets.
    pub fn replace(&self, objects: &[Value]) {
        self.shared.change(|state| state.replace(objects));
    }

    /// Deletes an object; whether there was one.
    pub fn delete(&self, resource: &str, namespace: &str, name: &str) -> bool {
        self.shared.change(|state| state.delete(resource, namespace, name))
    }

    /// Lets nobody read a resource (`virtualservices.networking.istio.io`), or lets everybody again. Watches under way go on.
    pub fn forbid(&self, resource: &str, forbidden: bool) {
        self.shared.change(|state| {
            let of = &mut state.manners.forbidden;
            if forbidden { of.insert(resource.to_owned()) } else { of.remove(resource) }
        });
    }

    /// Has no API of this group, or has it again.
    pub fn install(&self, group: &str, installed: bool) {
        self.shared.change(|state| {
            let of = &mut state.manners.missing;
            if installed { of.remove(group) } else { of.insert(group.to_owned()) }
        });
    }

    /// Forgets the history of its changes: who watches from an earlier moment on is told that it is gone.
    pub fn forget_history(&self) {
        self.shared.change(|state| {
            state.version += 1;
            state.forgotten = state.version;
            state.history.clear();
        });
    }

    /// Breaks all watches in the middle of a line.
    pub fn break_watches(&self) {
        self.shared.change(|state| {
            state.version += 1;
            state.manners.breaks_before = state.version;
        });
    }

    /// Watches say nothing any more and do not end, or do again. Those that have begun to stall stay so.
    pub fn stall(&self, stalls: bool) {
        self.shared.change(|state| state.manners.stalls = stalls);
    }

    /// Lines of watches come byte by byte.
    pub fn dribble(&self) {
        self.shared.change(|state| state.manners.dribbles = true);
    }

    /// Lists come in pages of so many objects; the first continuation is too old, if so said.
    pub fn pages(&self, of: usize, first_expires: bool) {
        self.shared.change(|state| (state.page, state.manners.expires_page) = (of, first_expires));
    }

    /// From now on only this token is good. It is in the file that kubeconfigs name, if so said.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn rotate(&self, token: &str) -> Result<()> {
        self.shared.change(|state| state.tokens = [token.to_owned()].into());
        Ok(fs::write(self.files.scratch("token"), token)?)
    }

    /// The token that it has given out is good, or is not: where clocks differ, not yet.
    pub fn accept(&self, accepted: bool) {
        let tokens = if accepted { vec![TOKEN.to_owned()] } else { Vec::new() };
        self.shared.change(|state| state.tokens = tokens.into_iter().collect());
    }

    /// How often a resource was listed or watched (`list`, `watch`).
    pub fn asked(&self, verb: &'static str, resource: &str) -> u64 {
        self.shared.state().asked.get(&(verb, resource.to_owned())).copied().unwrap_or_default()
    }

    /// The field selectors with which a resource was asked for; empty for none.
    pub fn selectors(&self, resource: &str) -> Vec<String> {
        self.shared.state().selectors.get(resource).into_iter().flatten().cloned().collect()
    }

    /// Events that were created.
    pub fn events(&self) -> Vec<Value> {
        self.shared.state().events.clone()
    }

    /// All that was asked, by verb and resource.
    pub fn all_asked(&self) -> std::collections::BTreeSet<(String, String)> {
        self.shared.state().asked.keys().map(|(verb, resource)| ((*verb).to_owned(), resource.clone())).collect()
    }

    /// The version of the last change.
    pub fn version(&self) -> u64 {
        self.shared.state().version
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A Secret that names other clusters: their ids, and kubeconfigs.
pub fn secret(name: &str, kubeconfigs: &[(&str, &str)]) -> Value {
    let data: serde_json::Map<String, Value> =
        kubeconfigs.iter().map(|(id, text)| ((*id).to_owned(), json!(base64(text.as_bytes())))).collect();
    json!({
        "apiVersion": "v1", "kind": "Secret", "type": "Opaque",
        "metadata": {"name": name, "namespace": "istio-system", "labels": {"istio/multiCluster": "true"}},
        "data": data,
    })
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word =
            u32::from_be_bytes([0, chunk[0], chunk.get(1).copied().unwrap_or(0), chunk.get(2).copied().unwrap_or(0)]);
        for i in 0..4 {
            let letter = ALPHABET[(word >> (18 - 6 * i)) as usize & 63] as char;
            text.push(if i <= chunk.len() { letter } else { '=' });
        }
    }
    text
}
