//! A fake API server: HTTPS, bearer tokens, paginated lists, watches with bookmarks, and a real one's failure modes.
//!
//! It serves list and watch requests as the Kubernetes documentation describes them, and creates Events.
//! It stores objects without validation.

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

use self::{serve::Server, state::State};
use crate::{Directory, Namespace, netns::enter};

/// The fake API server. It shuts down when the value is dropped.
pub struct Api {
    shared: Arc<Shared>,
    runtime: Option<tokio::runtime::Runtime>,
    serving: Option<Server>,
    listeners: Vec<(File, SocketAddr)>,
    acceptor: TlsAcceptor,
    certificate: String,
    files: Directory,
    number: u32,
}

/// The state that all request handlers share.
struct Shared {
    state: Mutex<State>,
    /// The resource version of the last change.
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
    /// Creates a server without objects, which does not listen yet.
    ///
    /// # Errors
    /// Returns an error if its certificates, runtime, or directory cannot be created.
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

    /// Listens on the loopback address of a namespace, and returns the path of a kubeconfig for `--kubeconfig`.
    /// The kubeconfig names a token file, which [`Self::rotate`] rewrites.
    ///
    /// # Errors
    /// Returns an error if it cannot listen there, or cannot write the files.
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

    /// Returns a directory laid out like a pod's service account: `token`, `ca.crt`, `namespace`.
    ///
    /// # Errors
    /// Returns an error if the directory cannot be written.
    pub fn account(&self) -> Result<PathBuf> {
        let account = self.files.scratch("account");
        fs::create_dir_all(&account)?;
        for (file, text) in [("token", TOKEN), ("ca.crt", &self.certificate), ("namespace", "portolan-system")] {
            fs::write(account.join(file), text)?;
        }
        Ok(account)
    }

    /// Listens in a namespace, and returns the remote-cluster Secret for it.
    /// With this Secret, another cluster's agents in that namespace watch this server as cluster `id`.
    ///
    /// # Errors
    /// Returns an error if it cannot listen there.
    pub fn secret(&mut self, namespace: &Namespace, id: &str) -> Result<Value> {
        let address = self.listen(namespace, "127.0.0.1:0".parse()?)?;
        let kubeconfig = self.kubeconfig(address, &json!({"token": TOKEN}));
        Ok(secret(&format!("istio-remote-secret-{id}"), &[(id, &kubeconfig.to_string())]))
    }

    /// Listens on an address in a namespace, and returns the actual address (a port of 0 is replaced).
    ///
    /// # Errors
    /// Returns an error if it cannot listen there.
    pub fn listen(&mut self, namespace: &Namespace, address: SocketAddr) -> Result<SocketAddr> {
        let listener = namespace.enter(|| Ok(TcpListener::bind(address)?))?;
        let address = listener.local_addr()?;
        self.listeners.push((namespace.open()?, address));
        self.serve(vec![listener])?;
        Ok(address)
    }

    /// Returns a kubeconfig for this server at `address`. `user` holds the credentials: `token` or `tokenFile`.
    pub fn kubeconfig(&self, address: SocketAddr, user: &Value) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": {
                "server": format!("https://{address}"), "certificate-authority-data": base64(self.certificate.as_bytes())}}],
            "users": [{"name": "it", "user": user}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        })
    }

    /// Returns the certificate of the authority that signed the server's, as PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    fn serve(&mut self, listeners: Vec<TcpListener>) -> Result<()> {
        let runtime = self.runtime.as_ref().context("the API server has shut down")?;
        let serving = self.serving.get_or_insert_default();
        for listener in listeners {
            listener.set_nonblocking(true)?;
            let _inside = runtime.enter();
            let listener = tokio::net::TcpListener::from_std(listener)?;
            serving.begin(listener, self.acceptor.clone(), Arc::clone(&self.shared));
        }
        Ok(())
    }

    /// Stops serving: open connections break, and new ones are refused. The objects stay.
    pub fn stop(&mut self) {
        if let (Some(runtime), Some(serving)) = (&self.runtime, self.serving.take()) {
            runtime.block_on(serving.end());
        }
    }

    /// Serves again on the same addresses, with the same objects.
    ///
    /// # Errors
    /// Returns an error if one of its addresses is in use.
    pub fn start(&mut self) -> Result<()> {
        let bind = |(namespace, address): &(File, SocketAddr)| enter(namespace, || Ok(TcpListener::bind(*address)?));
        let listeners: Vec<TcpListener> = self.listeners.iter().map(bind).collect::<Result<_>>()?;
        self.serve(listeners)
    }

    /// Creates or updates objects. Those that are unchanged cause no watch event.
    pub fn apply(&self, objects: &[Value]) {
        self.shared.change(|state| objects.iter().for_each(|object| state.apply(object)));
    }

    /// Creates or updates objects without watch events.
    pub fn apply_unseen(&self, objects: &[Value]) {
        self.shared.change(|state| {
            let len = state.history.len();
            objects.iter().for_each(|object| state.apply(object));
            state.history.truncate(len);
        });
    }

    /// Replaces all objects with these. Secrets that are not among them stay.
    pub fn replace(&self, objects: &[Value]) {
        self.shared.change(|state| state.replace(objects));
    }

    /// Deletes an object. Returns whether it existed.
    pub fn delete(&self, resource: &str, namespace: &str, name: &str) -> bool {
        self.shared.change(|state| state.delete(resource, namespace, name))
    }

    /// Forbids reads of a resource (`virtualservices.networking.istio.io`), or allows them. Open watches continue.
    pub fn forbid(&self, resource: &str, forbidden: bool) {
        self.shared.change(|state| {
            let of = &mut state.manners.forbidden;
            if forbidden { of.insert(resource.to_owned()) } else { of.remove(resource) }
        });
    }

    /// Installs or uninstalls an API group. Requests for a group that is not installed get 404.
    pub fn install(&self, group: &str, installed: bool) {
        self.shared.change(|state| {
            let of = &mut state.manners.missing;
            if installed { of.remove(group) } else { of.insert(group.to_owned()) }
        });
    }

    /// Compacts the history: a watch from an earlier resource version gets 410 (Expired).
    pub fn forget_history(&self) {
        self.shared.change(|state| {
            state.version += 1;
            state.forgotten = state.version;
            state.history.clear();
        });
    }

    /// Breaks all open watches in the middle of a line.
    pub fn break_watches(&self) {
        self.shared.change(|state| {
            state.version += 1;
            state.manners.breaks_before = state.version;
        });
    }

    /// Makes watches stall (no data, no end), or stops making them stall. Watches that already stall stay stalled.
    pub fn stall(&self, stalls: bool) {
        self.shared.change(|state| state.manners.stalls = stalls);
    }

    /// Sends the lines of watches byte by byte.
    pub fn dribble(&self) {
        self.shared.change(|state| state.manners.dribbles = true);
    }

    /// Serves lists in pages of `of` objects. With `first_expires`, the next continue token gets 410 (Expired).
    pub fn pages(&self, of: usize, first_expires: bool) {
        self.shared.change(|state| (state.page, state.manners.expires_page) = (of, first_expires));
    }

    /// Accepts only this token from now on, and writes it to the file that the kubeconfigs of [`Self::reach`] name.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written.
    pub fn rotate(&self, token: &str) -> Result<()> {
        self.shared.change(|state| state.tokens = [token.to_owned()].into());
        Ok(fs::write(self.files.scratch("token"), token)?)
    }

    /// Accepts or rejects the original token. With clock skew, a real server rejects a new token at first.
    pub fn accept(&self, accepted: bool) {
        let tokens = if accepted { vec![TOKEN.to_owned()] } else { Vec::new() };
        self.shared.change(|state| state.tokens = tokens.into_iter().collect());
    }

    /// Returns how many requests there were for a resource with a verb (`list`, `watch`, `create`).
    pub fn asked(&self, verb: &'static str, resource: &str) -> u64 {
        self.shared.state().asked.get(&(verb, resource.to_owned())).copied().unwrap_or_default()
    }

    /// Returns the distinct field selectors in requests for a resource. An empty string stands for none.
    pub fn selectors(&self, resource: &str) -> Vec<String> {
        self.shared.state().selectors.get(resource).into_iter().flatten().cloned().collect()
    }

    /// Returns the Events that clients created, oldest first.
    pub fn events(&self) -> Vec<Value> {
        self.shared.state().events.clone()
    }

    /// Returns the (verb, resource) pairs of all requests.
    pub fn all_asked(&self) -> std::collections::BTreeSet<(String, String)> {
        self.shared.state().asked.keys().map(|(verb, resource)| ((*verb).to_owned(), resource.clone())).collect()
    }

    /// Returns the resource version of the last change.
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

/// Returns a remote-cluster Secret in `istio-system` from pairs of (cluster ID, kubeconfig).
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
