import java.net.HttpURLConnection;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.net.URL;
import java.nio.channels.SocketChannel;

/** Connects to ADDRESS PORT with each socket API of Java, and prints the peer that each API sees. */
public class Client {
    public static void main(String[] arguments) throws Exception {
        String address = arguments[0];
        int port = Integer.parseInt(arguments[1]);
        try (Socket socket = new Socket(address, port)) {
            System.out.println("socket " + socket.getRemoteSocketAddress());
        }
        try (SocketChannel channel = SocketChannel.open(new InetSocketAddress(address, port))) {
            System.out.println("channel " + channel.getRemoteAddress());
        }
        HttpURLConnection connection = (HttpURLConnection) new URL("http://" + address + ":" + port + "/").openConnection();
        connection.setConnectTimeout(5000);
        connection.setReadTimeout(5000);
        System.out.println("http " + new String(connection.getInputStream().readAllBytes()).trim());
    }
}
