use std::{collections::HashMap, io, net::SocketAddr, sync::Arc};

use storage::{
    ranges::FetchFailure,
    registry::{ClientOptions, ProxyConfig, RegistryClient, Repository},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufStream, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::Mutex,
};

use crate::{
    certs::Authority,
    server::{Server, blob, get, options, serve},
};

/// A proxy that knows where names lead and keeps the heads of requests.
struct Proxy {
    addr: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    async fn start(names: HashMap<String, SocketAddr>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let (log, names) = (Arc::clone(&heads), Arc::new(names));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // Errors end the connection, which the client sees.
                tokio::spawn(forward(stream, Arc::clone(&names), Arc::clone(&log)));
            }
        });
        Self { addr, heads }
    }

    async fn heads(&self) -> Vec<String> {
        self.heads.lock().await.clone()
    }
}

/// One request head, then bytes in both directions.
async fn forward(
    stream: TcpStream,
    names: Arc<HashMap<String, SocketAddr>>,
    log: Arc<Mutex<Vec<String>>>,
) -> io::Result<()> {
    let mut stream = BufStream::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await? == 0 {
            return Ok(());
        }
    }
    log.lock().await.push(head.clone());
    let mut words = head.split(' ');
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    let authority = target.strip_prefix("http://").unwrap_or(target);
    let authority = authority.split('/').next().unwrap();
    let Some(origin) = names.get(authority) else {
        stream
            .write_all(b"HTTP/1.1 502 Unknown Name\r\ncontent-length: 0\r\n\r\n")
            .await?;
        return stream.flush().await;
    };
    let mut origin = TcpStream::connect(origin).await?;
    if method == "CONNECT" {
        stream
            .write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
            .await?;
        stream.flush().await?;
    } else {
        // Enough of a proxy for one request a connection: hyper servers take the absolute form.
        let close = head.replacen("\r\n", "\r\nconnection: close\r\n", 1);
        origin.write_all(close.as_bytes()).await?;
    }
    copy_bidirectional(&mut stream, &mut origin).await?;
    Ok(())
}

fn client(proxy: &str, no_proxy: &str, hosts: &std::path::Path) -> RegistryClient {
    let vars = [
        ("HTTP_PROXY", proxy),
        ("https_proxy", proxy),
        ("NO_PROXY", no_proxy),
    ];
    RegistryClient::new(ClientOptions {
        proxy: ProxyConfig::from_vars(vars).unwrap(),
        plain_http: vec!["plain.test".to_owned()],
        hosts_dirs: vec![hosts.to_owned()],
        ..options()
    })
}

#[tokio::test]
async fn plain_requests_name_the_whole_url() {
    let (data, digest) = blob(1000);
    let served = data.clone();
    let server = Server::start(move |request| serve(request, &served)).await;
    let name = format!("plain.test:{}", server.port());
    let proxy = Proxy::start(HashMap::from([(name.clone(), server.addr())])).await;
    let root = tempfile::tempdir().unwrap();
    let client = client(&format!("http://us:pw@{}", proxy.addr), "", root.path());
    let repository = Repository::new(&name, "a/b").unwrap();
    let got = get(&client, &repository, (digest, 1000), 5..9)
        .await
        .unwrap();
    assert_eq!(got, data.slice(5..9));
    let head = &proxy.heads().await[0];
    assert!(
        head.starts_with(&format!("GET http://{name}/v2/a/b/blobs/sha256:")),
        "{head}"
    );
    assert!(
        head.to_ascii_lowercase()
            .contains("proxy-authorization: basic dxm6chc="),
        "{head}"
    );
}

#[tokio::test]
async fn tls_goes_through_a_tunnel() {
    let (data, digest) = blob(1000);
    let authority = Authority::new();
    let root = tempfile::tempdir().unwrap();
    authority.write(root.path());
    let served = data.clone();
    let server = Server::start_with(Some(authority.server("secure.test")), move |request| {
        serve(request, &served)
    })
    .await;
    let dir = root.path().join("secure.test");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("hosts.toml"), "ca = \"../ca.pem\"").unwrap();
    let proxy = Proxy::start(HashMap::from([(
        "secure.test:443".to_owned(),
        server.addr(),
    )]))
    .await;
    let client = client(&format!("us:pw@{}", proxy.addr), "", root.path());
    let repository = Repository::new("secure.test", "a/b").unwrap();
    for _ in 0..2 {
        let got = get(&client, &repository, (digest, 1000), 5..9).await;
        let got = got.unwrap_or_else(|error| panic!("{}", error.report()));
        assert_eq!(got, data.slice(5..9));
    }
    let heads = proxy.heads().await;
    assert_eq!(heads.len(), 1, "the tunnel is kept");
    assert!(heads[0].starts_with("CONNECT secure.test:443 HTTP/1.1\r\nHost: secure.test:443\r\n"));
    assert!(
        heads[0].contains("Proxy-Authorization: Basic dXM6cHc="),
        "{}",
        heads[0]
    );
    let request = &server.log()[0];
    assert_eq!(request.header("host"), Some("secure.test"));
    assert!(
        request.header("proxy-authorization").is_none(),
        "not for the registry"
    );
    assert!(
        request.uri.scheme().is_none(),
        "in a tunnel, requests have the usual form"
    );
}

#[tokio::test]
async fn what_a_proxy_refuses_is_said() {
    let proxy = Proxy::start(HashMap::new()).await;
    let root = tempfile::tempdir().unwrap();
    let client = client(
        &format!("us:pw@{}", proxy.addr),
        "direct.invalid",
        root.path(),
    );
    let (_, digest) = blob(1000);
    let repository = Repository::new("secure.test", "a/b").unwrap();
    let error = get(&client, &repository, (digest, 1000), 5..9)
        .await
        .unwrap_err();
    let message = error.report();
    for part in [
        "secure.test cannot be reached",
        &proxy.addr.to_string(),
        "502 Unknown Name",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(!message.contains("pw"), "{message}");
    assert_eq!(error.failure(), FetchFailure::Unreachable);

    let before = proxy.heads().await.len();
    let repository = Repository::new("direct.invalid", "a/b").unwrap();
    get(&client, &repository, (digest, 1000), 5..9)
        .await
        .unwrap_err();
    assert_eq!(
        proxy.heads().await.len(),
        before,
        "NO_PROXY goes past the proxy"
    );
}

#[tokio::test]
async fn a_proxy_that_is_not_there_is_named() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    drop(listener);
    let root = tempfile::tempdir().unwrap();
    let client = client(&addr, "", root.path());
    let repository = Repository::new("secure.test", "a/b").unwrap();
    let (_, digest) = blob(1000);
    let error = get(&client, &repository, (digest, 1000), 5..9)
        .await
        .unwrap_err();
    let message = error.report();
    assert!(message.contains(&format!("proxy {addr}")), "{message}");
    assert!(message.contains("refused"), "{message}");
}
